"""Quantization room: placement, insertion, calibration and fine-tuning of any fx-traceable network."""

from quant.budget import BudgetResult, search_budget, without_units
from quant.calibration import CalibrationError, CalibrationResult, calibrate
from quant.codes import activation_codes, quantizer_calls
from quant.distillation import DistillationError, feature_nodes
from quant.equalization import EqualizationResult, equalize
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.finetuning import DivergenceError, TrainingOptions, TrainingState, new_state, train_epochs
from quant.folding import fold_batchnorms
from quant.graph import TraceError, trace
from quant.imported import ImportedRanges, RangeError, import_ranges
from quant.insertion import (
    ACTIVATION_QUANTIZERS,
    InsertionError,
    activation_quantizers,
    insert,
    placement_of,
    quantized_layers,
    set_mode,
)
from quant.placement import PlacementOptions, place
from quant.plan import Group, Placement, TensorSite, WeightSite
from quant.plan_file import PlanError, dump_placement, load_placement
from quant.policy import Policy, PolicyError, Rule, parse_rules
from quant.reconstruction import LayerRepair, reconstruct
from quant.sensitivity import UnitScore, measure_fisher, measure_sqnr
from quant.sharing import ConcatDecision, SharingResult, measure_sharing

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "BudgetResult",
    "CalibrationError",
    "CalibrationResult",
    "ConcatDecision",
    "DistillationError",
    "DivergenceError",
    "EqualizationResult",
    "FakeQuantize",
    "Group",
    "ImportedRanges",
    "InsertionError",
    "LayerRepair",
    "Mode",
    "Placement",
    "PlacementOptions",
    "PlanError",
    "Policy",
    "PolicyError",
    "RangeError",
    "Rule",
    "SharingResult",
    "TensorSite",
    "TraceError",
    "TrainingOptions",
    "TrainingState",
    "UnitScore",
    "WeightFakeQuantize",
    "WeightSite",
    "activation_codes",
    "activation_quantizers",
    "calibrate",
    "dump_placement",
    "equalize",
    "feature_nodes",
    "fold_batchnorms",
    "import_ranges",
    "insert",
    "load_placement",
    "measure_fisher",
    "measure_sharing",
    "measure_sqnr",
    "new_state",
    "parse_rules",
    "place",
    "placement_of",
    "quantized_layers",
    "quantizer_calls",
    "reconstruct",
    "search_budget",
    "set_mode",
    "trace",
    "train_epochs",
    "without_units",
]
