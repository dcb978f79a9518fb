"""Slimming: cut what a mask left dead out of a model, and prove that the outputs stay the same."""

from tritprune.slimming.auto_slim import AutoSlimConfig, model_slim, parse_auto_slim_config
from tritprune.slimming.certificate import (
    Certificate,
    certify,
    check_saved,
    count_parameters,
    saved_cases,
    saved_inputs,
    state_sha256,
)
from tritprune.slimming.keras_head import ClassifierHeadSearcherTF
from tritprune.slimming.latency import Latency, measure, measure_together
from tritprune.slimming.leftovers import Refusal
from tritprune.slimming.made_inputs import make_inputs
from tritprune.slimming.optimizer_state import Carried, slim_optimizer
from tritprune.slimming.searchers import (
    ClassifierHeadSearcher,
    JitBasicSearcher,
    Linear2LinearSearcher,
    RecipeSearcher,
    SelfMHASearcher,
    get_attributes,
    get_common_module,
    print_iterables,
)
from tritprune.slimming.slimmer import Cut, SlimResult, slim, slim_model, survey

__all__ = [
    "AutoSlimConfig",
    "Carried",
    "Certificate",
    "ClassifierHeadSearcher",
    "ClassifierHeadSearcherTF",
    "Cut",
    "JitBasicSearcher",
    "Latency",
    "Linear2LinearSearcher",
    "RecipeSearcher",
    "Refusal",
    "SelfMHASearcher",
    "SlimResult",
    "certify",
    "check_saved",
    "count_parameters",
    "get_attributes",
    "get_common_module",
    "make_inputs",
    "measure",
    "measure_together",
    "model_slim",
    "parse_auto_slim_config",
    "print_iterables",
    "saved_cases",
    "saved_inputs",
    "slim",
    "slim_model",
    "slim_optimizer",
    "state_sha256",
    "survey",
]
