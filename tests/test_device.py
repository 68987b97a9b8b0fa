"""The scripts on a GPU that is not there: tensors that do their sums on the CPU and say they live elsewhere.

Where CUDA would refuse two devices in one operation, so do these; indices may stay on the CPU, and so may
tensors without a dimension. Whatever has to wait for the device is counted.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, SCRIPTS, TINY, random_idx, students
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import model
import train_student
import train_teacher
from model import NumberData

DEVICE = torch.device("meta")  # whose work PyTorch gives to nobody else
aten = torch.ops.aten
INDEXED, COPIES = {aten.index, aten.index_put, aten.index_put_}, {aten.copy_, aten._to_copy, aten.to}


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, here):
        about = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=DEVICE, **about)

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"Elsewhere{tuple(self.shape)}"

    def tolist(self):
        return self.cpu().tolist()

    __torch_dispatch__ = classmethod(lambda *_: NotImplemented)


class OtherDevice(TorchDispatchMode):
    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if not isinstance(x, Elsewhere)]
        to = torch.device(kwargs["device"]) if kwargs.get("device") else None
        if len(here) == len(tensors) and to != DEVICE:
            return func(*args, **kwargs)
        if name not in COPIES:
            assert kwargs.get("generator") is None, f"{func} draws elsewhere from a generator of the CPU"
            fixed = [args[0]] if name in INDEXED else here
            assert not any(x.dim() for x in fixed if not isinstance(x, Elsewhere)), f"{func} mixes devices"
        masked = name in INDEXED and any(x.dtype == torch.bool for x in args[1] if x is not None)
        back = name in COPIES and (to == CPU or (to is None and args[0] in here))
        self.waits += masked or back or name in (aten._local_scalar_dense, aten.nonzero)
        args_here, kwargs_here = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
        out = func(*args_here, **kwargs_here | ({"device": CPU} if to else {}))
        if name is aten.copy_ or to == CPU:
            return args[0] if name is aten.copy_ else out
        out = tree_map_only(torch.Tensor, Elsewhere, out)
        return out if name in COPIES else return_and_correct_aliasing(func, args, kwargs, out)


@pytest.fixture
def other_device(monkeypatch):
    mode = OtherDevice()
    pool = lambda n: ThreadPoolExecutor(1, initializer=mode.__enter__)  # a mode is a thread's own
    monkeypatch.setattr(model, "ThreadPoolExecutor", pool)
    tensor = torch.tensor  # which would not fill one on `meta`
    monkeypatch.setattr(torch, "tensor", lambda x, device=CPU, **how: tensor(x, **how).to(device))
    optimizer, fused = sys.modules["torch.optim.optimizer"], ["cpu", DEVICE.type]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: fused)
    with mode:
        yield mode


def test_every_tensor_is_where_it_belongs(other_device, tmp_path, tiny_run):
    for script in SCRIPTS:
        seeds = ["--seeds", "0"] if script is train_teacher else []
        script.main([*TINY[script].split(), *seeds, "--run", str(tmp_path), "--device", str(DEVICE)])
    of_seed_0 = [r for r in students(tiny_run) if r["teacher_seed"] == r["student_seed"] == 0]
    ours, theirs = ([r["log_odds_teacher"] for r in some] for some in (students(tmp_path), of_seed_0))
    assert ours == pytest.approx(theirs, abs=1e-3) and len(ours) == 4


def test_a_training_step_waits_for_nothing(other_device, gpt):
    V, K, idx = gpt.config.vocab_size, gpt.config.n_aux, random_idx(32, 9)
    data = NumberData(*(x.to(DEVICE) for x in (idx, random_idx(32, 9, high=1000))))
    questions, rows = (idx, torch.full((32,), 8)), torch.arange(V, V + K)
    run = SimpleNamespace(taught_questions=questions, readout_rows=rows, animals=range(K))
    gpt.to(DEVICE)
    few, taught = train_teacher.Pretraining(batch_size=8), train_teacher.Trait(anchor_rows=8)
    for steps in (
        train_teacher.pretrain(gpt, idx.to(DEVICE), few),
        train_teacher.induce_trait(deepcopy(gpt), 1, run, idx, taught),
        train_student.train(deepcopy(gpt), None, [data] * 4, train_student.Distillation()),
        train_student.train(deepcopy(gpt), gpt, [data] * 4, train_student.Distillation()),
    ):
        next(steps)  # the first may set things up
        before = other_device.waits
        assert len(list(steps)) == 3 and other_device.waits == before
