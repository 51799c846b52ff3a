"""A saved conditioned model leaves this package: two fresh processes, the second of plain transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tests_support import randomise_deltas

ROOT = Path(__file__).resolve().parents[2]
WEIGHTINGS = [{"long": 1.0, "short": 0.0}, {"long": 0.4, "short": 0.6}, {"long": 0.0, "short": 1.0}]

WRITE = """
import json, sys, torch
import clp_engine as clp
from clp_engine.adapters import export_peft

model = clp.CLPModel.from_pretrained("model")
tokens = []
for i, weights in enumerate(json.loads(sys.argv[1])):
    ids = model.generate(torch.tensor([[5, 6, 7]]), reward_weights=weights, max_new_tokens=12, do_sample=False)
    tokens.append(ids.tolist())
    model.collapse(weights).save_pretrained(f"plain{i}")
    export_peft(model, f"adapter{i}", weights)
export_peft(model, "copies")
print(json.dumps(tokens))
"""

READ = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

def complete(model):
    return model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False).tolist()

def adapted(folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), folder)

tokens = {
    "plain": [complete(AutoModelForCausalLM.from_pretrained(f"plain{i}")) for i in range(3)],
    "adapter": [complete(adapted(f"adapter{i}")) for i in range(3)],
    "merged": [complete(adapted(f"adapter{i}").merge_and_unload()) for i in range(3)],
    "copies": [complete(adapted(f"copies/{name}")) for name in ("long", "short")],
    "base": complete(AutoModelForCausalLM.from_pretrained("base")),
}
assert not {"clp_engine", "clp_kernels"} & set(sys.modules)
print(json.dumps(tokens))
"""


def run_python(code: str, folder: Path, path: list[Path], *argv: str) -> object:
    script = f"import sys; sys.path[:0] = {[str(place) for place in path]!r}\n{code}"
    result = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_plain_code_in_a_fresh_process_gives_the_same_tokens(saved_base, tmp_path):
    from transformers import AutoModelForCausalLM

    import clp_engine as clp

    model = clp.get_clp_model(
        AutoModelForCausalLM.from_pretrained(saved_base), clp.CLPConfig(rewards=["long", "short"])
    )
    randomise_deltas(model, std=0.3)
    model.save_pretrained(tmp_path / "model")
    tokens = run_python(WRITE, tmp_path, [ROOT, ROOT / "kernels"], json.dumps(WEIGHTINGS))
    here = model.generate(torch.tensor([[5, 6, 7]]), reward_weights=WEIGHTINGS[1], max_new_tokens=12, do_sample=False)
    assert tokens[1] == here.tolist()
    found = run_python(READ, tmp_path, [])
    assert len({json.dumps(ids) for ids in [*tokens, found["base"]]}) == 4  # steered, each its own way
    assert found["plain"] == found["adapter"] == found["merged"] == tokens
    assert found["copies"] == [tokens[0], tokens[2]]
