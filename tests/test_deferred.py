"""Settings are checked without torch, and torch is whole afterwards: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str, *folders: str) -> None:
    """Runs the code in a new process, with these folders on its path."""
    code = f"import sys; sys.path += {list(folders)}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checking_any_recipe_imports_no_torch_and_leaves_it_whole():
    """But for rewards that are models, whose class is imported with them."""
    run("""
from align.config import compose, recipes
from align.config.validate import validate
checked = 0
for name in recipes():
    config = compose([f"recipe={name}"])
    if "align.rewards.model" in str(config.reward):
        continue
    try:
        validate(config)
    except ValueError as error:  # of papers, data that nobody has here
        assert "bitsandbytes" in str(error) or "no such" in str(error), (name, error)
    assert not {"torch", "transformers", "datasets"} & set(sys.modules), name
    checked += 1
assert checked > 40
from align.advantages import baselines
from align.composers import base
from align.objectives import losses, preference
import torch
assert preference.torch is torch and losses.Tensor is base.Tensor is torch.Tensor and losses.F is torch.nn.functional
composer = base.tensor([0.5])
assert isinstance(composer, base.Tensor)
""")


USES = {
    "an attribute": "assert light.torch.ones(2).sum() == 2",
    "a function of functional": "assert light.F.relu(light.nn.Parameter(light.torch.ones(1))) == 1",
    "an instance": "assert not light.is_tensor(1); import torch; assert light.is_tensor(torch.ones(1))",
    "a decorated function": "import torch; assert not light.twice(torch.nn.Parameter(torch.ones(1))).requires_grad",
    "one called first": "assert light.twice(3) == 6 and light.torch.is_grad_enabled()",
    "a pickled object": "from pickle import *; import torch; assert loads(dumps(light.Part(torch.ones(2)))).x.any()",
    "another module of it": "import torch.utils.data, torch.distributed; assert light.torch is torch",
    "its import": "import torch; assert light.torch is torch and light.nn is torch.nn and light.kept[0].ones(1) == 1",
}
LIGHT = """
import torch
import torch.nn.functional as F
from torch import Tensor, nn
kept = [torch]
def is_tensor(x): return isinstance(x, Tensor)
@torch.no_grad()
def twice(x): return 2 * x
class Part:
    def __init__(self, x: Tensor): self.x = x
"""


@pytest.mark.parametrize("use", USES)
def test_a_module_imported_meanwhile_is_as_any_other_once_torch_is_used(tmp_path, use):
    (tmp_path / "light.py").write_text(LIGHT)
    run(
        f"""
from align.config.deferred import deferred
from importlib.util import find_spec
with deferred():
    import light
    assert "torch" in sys.modules and find_spec("torch").origin
assert "torch" not in sys.modules and find_spec("torch").origin  # whoever asks does not import it
with deferred():
    assert sys.modules["torch"] is light.torch
{USES[use]}
import torch
assert torch.__spec__.loader.get_source("torch") and torch.__file__
assert light.torch is torch and light.Tensor is torch.Tensor and light.nn is torch.nn
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "align.config.deferred"]
with deferred():
    assert sys.modules["torch"] is torch
""",
        str(tmp_path),
    )


HEAVY = {
    "a module": "import torch\nclass Net(torch.nn.Module): pass\nassert Net().state_dict() == {}",
    "a module by name": "from torch import nn\nclass Net(nn.Module): pass\nassert issubclass(Net, nn.Module)",
    "a tensor": "from torch import Tensor\nclass Own(Tensor): pass\nassert issubclass(Own, Tensor)",
    "a type": "from torch import Tensor\nKind = Tensor | None\nassert isinstance(None, Kind)",
    "a constant": "import torch\nONE = torch.ones(1)\nassert isinstance(ONE, torch.Tensor)",
    "a submodule": "import torch.utils.data\nfrom torch.nn.utils.rnn import pad_sequence\n"
    "import torch.distributed as d\n"
    "assert d.__spec__.name == torch.distributed.__name__ and torch.utils.data.Dataset",
    "a function of autograd": "import torch\nclass Own(torch.autograd.Function): pass\nassert Own.apply",
    "transformers": "import transformers as t\nfrom torch import nn\nassert issubclass(t.PreTrainedModel, nn.Module)",
}


@pytest.mark.parametrize("what", HEAVY)
def test_a_module_that_uses_torch_while_it_is_imported_gets_it(tmp_path, what):
    """As classes of one's own may."""
    (tmp_path / "light.py").write_text(LIGHT)
    (tmp_path / "heavy.py").write_text(HEAVY[what])
    run(
        """
from align.config.deferred import deferred
with deferred():
    import light
    import heavy
import torch
assert sys.modules["torch"] is torch and light.torch is torch and light.is_tensor(torch.ones(1))
assert vars(heavy).get("torch", torch) is torch
import pickle
assert pickle.loads(pickle.dumps(torch.nn.Linear(2, 1))).weight.shape == (1, 2)
""",
        str(tmp_path),
    )
