"""Local surrogates: coefficients of simple models fitted around the example."""
