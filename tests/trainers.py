"""What the tests of trainers' formats share: runs of the command line, and float64 comparisons."""

import numpy as np
from safetensors.torch import load_file

from tests import oracle, small

RELATIVE = 2e-6  # of the largest element of a row, float32


def loaded(folder):
    """All weights of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def merged(base, adapter, out, *options):
    """Weights of a merge that must succeed."""
    result = small.run("merge", base, adapter, "-o", out, "--verify", "full", *options)
    assert result.exit_code == 0, result.stdout + result.stderr
    return loaded(out)


def refused(base, adapter, out, *options):
    """The message of a merge that is refused, on one line; nothing may be written."""
    result = small.run("merge", base, adapter, "-o", out, *options)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert not out.exists()
    return " ".join(result.stderr.split())


def inspected(adapter, *options):
    """The report of an inspection that must succeed."""
    result = small.run("inspect", adapter, *options)
    assert result.exit_code == 0, result.stdout + result.stderr
    return result.stdout


def distance(got, want):
    """Largest difference, relative to the largest element of each row."""
    got, want = np.asarray(oracle.float64(got)), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    size = np.abs(want).max(axis=-1, keepdims=True)
    return float((np.abs(got - want) / size).max())
