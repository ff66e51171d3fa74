"""Methods, one file each, in folders by family; importing this package registers them."""

from apportion.methods.cam.grad_cam import GradCAM
from apportion.methods.gradient.gradient import Gradient
from apportion.methods.gradient.gradient_times_input import GradientTimesInput
from apportion.methods.gradient.smooth_grad import SmoothGrad
from apportion.methods.gradient.smooth_grad_squared import SmoothGradSquared
from apportion.methods.gradient.var_grad import VarGrad
from apportion.methods.path.expected_gradients import ExpectedGradients
from apportion.methods.path.idgi import IDGI
from apportion.methods.path.integrated_gradients import IntegratedGradients
from apportion.methods.path.split_ig import SplitIG

__all__ = [
    "IDGI",
    "ExpectedGradients",
    "GradCAM",
    "Gradient",
    "GradientTimesInput",
    "IntegratedGradients",
    "SmoothGrad",
    "SmoothGradSquared",
    "SplitIG",
    "VarGrad",
]
