"""What a run does at which step: the recipes, their stages and their plans. Floor 0; torch is not imported."""

from nmflow.schedules.base import PhasedRecipe, Recipe
from nmflow.schedules.plan import Segment, plan
from nmflow.schedules.registry import recipe, recipes, sequence
from nmflow.schedules.sequence import Part, Sequence
from nmflow.schedules.stage import PRUNED_GRADIENTS, MaskRule, Phase, PrunedGradient, Stage
from nmflow.schedules.window import Window

__all__ = [
    "PRUNED_GRADIENTS", "MaskRule", "Part", "Phase", "PhasedRecipe", "PrunedGradient", "Recipe", "Segment",
    "Sequence", "Stage", "Window", "plan", "recipe", "recipes", "sequence",
]
