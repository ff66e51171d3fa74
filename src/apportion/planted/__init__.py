"""Models and data whose right answer is known."""

from apportion.planted.functions import Linear, Max, Min, Product, ReluProduct, RootSum, Saturated
from apportion.planted.games import additive, homogeneous, linear, multilinear, saturated
from apportion.planted.grids import Grid, di_full, di_part, noise_cells, split
from apportion.planted.networks import conv_net, dense_net, equal_pair, largest_pair, shifted_pair, symmetric_net
from apportion.planted.pairs import (
    exchangeable,
    same_but_shifted,
    same_function,
    same_maximum,
    same_relu,
    with_dummy,
)
from apportion.planted.problem import Pair, Planted, PlantedGame, dividends
from apportion.planted.suppressor import Suppressor, suppressor
from apportion.planted.variants import Variant, folded, permuted, rescaled, shifted

__all__ = [
    "Grid",
    "Linear",
    "Max",
    "Min",
    "Pair",
    "Planted",
    "PlantedGame",
    "Product",
    "ReluProduct",
    "RootSum",
    "Saturated",
    "Suppressor",
    "Variant",
    "additive",
    "conv_net",
    "dense_net",
    "di_full",
    "di_part",
    "dividends",
    "equal_pair",
    "exchangeable",
    "folded",
    "homogeneous",
    "largest_pair",
    "linear",
    "multilinear",
    "noise_cells",
    "permuted",
    "rescaled",
    "same_but_shifted",
    "same_function",
    "same_maximum",
    "same_relu",
    "saturated",
    "shifted",
    "shifted_pair",
    "split",
    "suppressor",
    "symmetric_net",
    "with_dummy",
]
