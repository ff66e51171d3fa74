"""The waists: what every recipe, metric and picture is built on."""
