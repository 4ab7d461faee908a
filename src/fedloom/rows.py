"""The rows that every comparison knows by name: baselines that are configurations, as what each changes in a recipe.

A row that is none of these is one of the recipe's own ([compare]), or a method by its name. `linear-probe` is a head at
each site alone, as long as other rows train; `fedavg-head` the mean of such heads, where all sites have one vocabulary.
`feddat-alone` and `feddlp-alone` train what those methods serve at sites that hear nothing of each other; a newcomer
of the latter starts from the shared adapter, as in FedDLP: that view is not one of training alone.
"""

from collections.abc import Mapping

from fedloom.tables import NONE, Table

ROWS: Mapping[str, Table] = {
    "ensemble-distilled": {"method": {"name": "ensemble", "distil": True}},
    "fedadagrad": {"method": {"name": "fedopt", "server": "adagrad"}},
    "fedadam": {"method": {"name": "fedopt", "server": "adam"}},
    "fedavg-adapter": {"method": {"name": "fedavg", "adapter": {"kind": "bottleneck"}}},
    "fedavg-bitfit": {"method": {"name": "fedavg", "adapter": {"kind": "bitfit"}}},
    "fedavg-head": {
        "method": {"name": "fedavg", "adapter": {"kind": "head"}, "heads": "shared"},
        "task": {"head": "linear"},
    },
    "fedavg-ia3": {"method": {"name": "fedavg", "adapter": {"kind": "ia3"}}},
    "fedavg-lora": {"method": {"name": "fedavg", "adapter": {"kind": "lora"}}},
    "fedavg-lora-r2": {"method": {"name": "fedavg", "adapter": {"kind": "lora", "rank": 2}}},
    "fedavg-lora-r2-untuned": {
        "method": {"name": "fedavg", "adapter": {"kind": "lora", "rank": 2}},
        "training": {"finetune": 0},
    },
    "fedavg-norms": {"method": {"name": "fedavg", "adapter": {"kind": "norms"}}},
    "fedavg-prompt": {"method": {"name": "fedavg", "adapter": {"kind": "prompt"}}},
    "fedavg-untuned": {"method": {"name": "fedavg"}, "training": {"finetune": 0}},
    "fedavgm": {"method": {"name": "fedopt", "server": "momentum", "eta": 1.0}},
    "fedclip": {"method": {"name": "fedavg", "adapter": {"kind": "attention"}}},
    "feddat-alone": {"method": {"name": "feddat", "exchange": False}},
    "feddlp": {"method": {"name": "feddlp", "adapter": {"kind": "lora"}}},
    "feddlp-alone": {  # its private adapter, gates and all, at sites that hear nothing of each other
        "method": {
            "name": "feddlp",
            "adapter": {"kind": "lora"},
            "gamma": 0.0,
            "gamma_shared": 0.0,
            "predict_with": "local",
        }
    },
    "feddlp-global": {"method": {"name": "feddlp", "adapter": {"kind": "lora"}, "predict_with": "global"}},
    "feddlp-local": {"method": {"name": "feddlp", "adapter": {"kind": "lora"}, "predict_with": "local"}},
    "feddlp-no-distillation": {
        "method": {"name": "feddlp", "adapter": {"kind": "lora"}, "gamma": 0.0, "gamma_shared": 0.0}
    },
    "feddlp-no-pruning": {"method": {"name": "feddlp", "adapter": {"kind": "lora"}, "pruning": NONE}},
    "feddlp-one-way": {"method": {"name": "feddlp", "adapter": {"kind": "lora"}, "gamma_shared": 0.0}},
    "fedexlora": {"method": {"name": "fedexlora", "adapter": {"kind": "lora"}}},
    "fedpia-client": {"method": {"name": "fedpia", "permute": "client"}},
    "fedpia-literal": {"method": {"name": "fedpia", "integration": "literal", "scale": "one", "gamma": 1e-3}},
    "fedpia-server": {"method": {"name": "fedpia", "permute": "server"}},
    "fedpia-unpermuted": {"method": {"name": "fedpia", "permute": "neither"}},
    "fedprox": {"method": {"name": "fedavg", "mu": 0.1}},
    "fedsa-lora": {"method": {"name": "partial", "preset": "fedsa_lora", "adapter": {"kind": "lora"}}},
    "fedyogi": {"method": {"name": "fedopt", "server": "yogi"}},
    "ffa-lora": {"method": {"name": "partial", "preset": "ffa_lora", "adapter": {"kind": "lora"}}},
    "flexlora": {"method": {"name": "flexlora", "adapter": {"kind": "lora"}}},
    "flora": {"method": {"name": "flora", "adapter": {"kind": "lora"}}},
    "frozen": {"method": {"name": "frozen"}, "federation": {"rounds": 1}},
    "full": {"method": {"name": "fedavg", "adapter": {"kind": "everything"}}},
    "hlora": {"method": {"name": "flexlora", "adapter": {"kind": "lora"}}},  # one rule, published under two names
    "linear-probe": {"method": {"name": "fedavg", "adapter": {"kind": "head"}}, "task": {"head": "linear"}},
    "local-adapter": {"method": {"name": "local", "adapter": {"kind": "bottleneck"}}},
    "local-lora": {"method": {"name": "local", "adapter": {"kind": "lora"}}},
    "majority": {"method": {"name": "majority"}, "federation": {"rounds": 1}},
    "promptfl": {
        "method": {"name": "fedavg", "adapter": {"kind": "context"}},
        "backbone": {"towers": ["text"]},
        "task": {"head": "prompts", "template": "X X X X {}."},
    },
}
