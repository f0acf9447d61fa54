"""A model with modules of its own over another model's tensors: what is replaced in one is not replaced in the other."""

from __future__ import annotations

import copy

from torch import nn


def share(model: nn.Module) -> nn.Module:
    """A copy of a module tree that shares every parameter and buffer; modules may be replaced in it.

    A module that appears twice in the tree appears twice in the copy. Attributes that are not modules are shared.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        new = copies[id(module)] = copy.copy(module)
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            new.__dict__[table] = copy.copy(module.__dict__[table])
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else copied(child)
        return new

    return copied(model)
