"""Quantization: placement, insertion, calibration and fine-tuning of any fx-traceable network."""

from core.errors import (
    CalibrationError,
    DistillationError,
    DivergenceError,
    PlacementError,
    PolicyError,
    RangeError,
    TraceError,
)
from quant.calibration.calibrate import CalibrationResult, Share, calibrate
from quant.calibration.imported import ImportedRanges, import_ranges
from quant.codes import activation_codes
from quant.fake_quantize import FakeQuantize, Mode, WeightFakeQuantize
from quant.finetuning.distillation import feature_nodes
from quant.finetuning.quantization_aware import FineTuningOptions, QuantizationAware
from quant.folding import fold_batchnorms
from quant.graph import trace
from quant.insertion import (
    ACTIVATION_QUANTIZERS,
    activation_quantizers,
    insert,
    placement_of,
    quantized_layers,
    set_mode,
)
from quant.naming import QUANTIZER, with_named_nodes
from quant.placement.files import dump_placement, load_placement, parse_placement
from quant.placement.placement import Group, Placement, TensorSite, WeightSite
from quant.placement.placer import PlacementOptions, place
from quant.placement.policy import Policy, Rule
from quant.repair.equalization import EqualizationResult, equalize
from quant.repair.recalibration import ScoreLine, fold_lines, recalibrate_scores
from quant.repair.reconstruction import LayerRepair, reconstruct
from quant.sensitivity.budget import BudgetResult, search_budget, without_units
from quant.sensitivity.fisher import Figures, measure_fisher
from quant.sensitivity.scores import UnitScore, measure_sqnr
from quant.sensitivity.switching import SwitchedUnits, switch_units
from quant.sharing import ConcatDecision, SharingResult, measure_sharing

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "QUANTIZER",
    "BudgetResult",
    "CalibrationError",
    "CalibrationResult",
    "ConcatDecision",
    "DistillationError",
    "DivergenceError",
    "EqualizationResult",
    "FakeQuantize",
    "Figures",
    "FineTuningOptions",
    "Group",
    "ImportedRanges",
    "LayerRepair",
    "Mode",
    "Placement",
    "PlacementError",
    "PlacementOptions",
    "Policy",
    "PolicyError",
    "QuantizationAware",
    "RangeError",
    "Rule",
    "ScoreLine",
    "Share",
    "SharingResult",
    "SwitchedUnits",
    "TensorSite",
    "TraceError",
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
    "fold_lines",
    "import_ranges",
    "insert",
    "load_placement",
    "measure_fisher",
    "measure_sharing",
    "measure_sqnr",
    "parse_placement",
    "place",
    "placement_of",
    "quantized_layers",
    "recalibrate_scores",
    "reconstruct",
    "search_budget",
    "set_mode",
    "switch_units",
    "trace",
    "with_named_nodes",
    "without_units",
]
