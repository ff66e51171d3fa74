"""Methods, one file each, in folders by family; importing this package registers them."""

from apportion.methods.backward.contrastive_excitation_backprop import ContrastiveExcitationBackprop
from apportion.methods.backward.deconvnet import Deconvnet
from apportion.methods.backward.deep_lift import DeepLIFT
from apportion.methods.backward.deep_shap import DeepSHAP
from apportion.methods.backward.deep_taylor import DeepTaylor
from apportion.methods.backward.excitation_backprop import ExcitationBackprop
from apportion.methods.backward.guided_backprop import GuidedBackprop
from apportion.methods.backward.lrp import LRP
from apportion.methods.backward.pattern_attribution import PatternAttribution
from apportion.methods.backward.pattern_net import PatternNet
from apportion.methods.backward.rect_grad import RectGrad
from apportion.methods.bias.full_grad import FullGrad
from apportion.methods.bias.full_grad_saliency import FullGradSaliency
from apportion.methods.cam.cam import CAM
from apportion.methods.cam.eigen_cam import EigenCAM
from apportion.methods.cam.grad_cam import GradCAM
from apportion.methods.cam.grad_cam_plus_plus import GradCAMPlusPlus
from apportion.methods.cam.guided_grad_cam import GuidedGradCAM
from apportion.methods.cam.hires_cam import HiResCAM
from apportion.methods.cam.layer_cam import LayerCAM
from apportion.methods.cam.score_cam import ScoreCAM
from apportion.methods.cam.smooth_grad_cam_plus_plus import SmoothGradCAMPlusPlus
from apportion.methods.cam.x_grad_cam import XGradCAM
from apportion.methods.gradient.gradient import Gradient
from apportion.methods.gradient.gradient_times_input import GradientTimesInput
from apportion.methods.gradient.smooth_grad import SmoothGrad
from apportion.methods.gradient.smooth_grad_squared import SmoothGradSquared
from apportion.methods.gradient.var_grad import VarGrad
from apportion.methods.path.agi import AGI
from apportion.methods.path.big import BIG
from apportion.methods.path.blur_ig import BlurIG
from apportion.methods.path.boundary_saliency import BoundarySaliency
from apportion.methods.path.credible_path import CrediblePath
from apportion.methods.path.expected_gradients import ExpectedGradients
from apportion.methods.path.guided_ig import GuidedIG
from apportion.methods.path.idgi import IDGI
from apportion.methods.path.ig2 import IG2
from apportion.methods.path.integrated_gradients import IntegratedGradients
from apportion.methods.path.lpi import LPI
from apportion.methods.path.neflag import NeFLAG
from apportion.methods.path.path_method import PathMethod
from apportion.methods.path.samp import SAMP
from apportion.methods.path.spi import SPI, SPIProbability
from apportion.methods.path.split_ig import SplitIG
from apportion.methods.removal.ace import ACE
from apportion.methods.removal.banzhaf import Banzhaf
from apportion.methods.removal.kernel_shap import KernelSHAP
from apportion.methods.removal.loss_shap import LossSHAP
from apportion.methods.removal.occlusion import Occlusion
from apportion.methods.removal.prediction_difference import PredictionDifference
from apportion.methods.removal.rise import RISE
from apportion.methods.removal.sage import SAGE
from apportion.methods.removal.semivalue import Semivalue
from apportion.methods.removal.shapley import Shapley
from apportion.methods.subset.cx_plain import CXPlain
from apportion.methods.subset.extremal_perturbation import ExtremalPerturbation
from apportion.methods.subset.information_bottleneck import InformationBottleneck
from apportion.methods.subset.l2x import L2X
from apportion.methods.subset.meaningful_perturbation import MeaningfulPerturbation
from apportion.methods.subset.real_time_saliency import RealTimeSaliency
from apportion.methods.surrogate.bay_lime import BayLIME
from apportion.methods.surrogate.c_lime import CLIME
from apportion.methods.surrogate.glime import GLIME
from apportion.methods.surrogate.lime import LIME
from apportion.methods.surrogate.opti_lime import OptiLIME
from apportion.methods.surrogate.s_lime import SLIME

__all__ = [
    "ACE",
    "AGI",
    "BIG",
    "CAM",
    "CLIME",
    "GLIME",
    "IDGI",
    "IG2",
    "L2X",
    "LIME",
    "LPI",
    "LRP",
    "RISE",
    "SAGE",
    "SAMP",
    "SLIME",
    "SPI",
    "Banzhaf",
    "BayLIME",
    "BlurIG",
    "BoundarySaliency",
    "CXPlain",
    "ContrastiveExcitationBackprop",
    "CrediblePath",
    "Deconvnet",
    "DeepLIFT",
    "DeepSHAP",
    "DeepTaylor",
    "EigenCAM",
    "ExcitationBackprop",
    "ExpectedGradients",
    "ExtremalPerturbation",
    "FullGrad",
    "FullGradSaliency",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientTimesInput",
    "GuidedBackprop",
    "GuidedGradCAM",
    "GuidedIG",
    "HiResCAM",
    "InformationBottleneck",
    "IntegratedGradients",
    "KernelSHAP",
    "LayerCAM",
    "LossSHAP",
    "MeaningfulPerturbation",
    "NeFLAG",
    "Occlusion",
    "OptiLIME",
    "PathMethod",
    "PatternAttribution",
    "PatternNet",
    "PredictionDifference",
    "RealTimeSaliency",
    "RectGrad",
    "SPIProbability",
    "ScoreCAM",
    "Semivalue",
    "Shapley",
    "SmoothGrad",
    "SmoothGradCAMPlusPlus",
    "SmoothGradSquared",
    "SplitIG",
    "VarGrad",
    "XGradCAM",
]
