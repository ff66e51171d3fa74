"""Influential subsets: the smallest region that decides, found by optimization or by a network trained to find it."""
