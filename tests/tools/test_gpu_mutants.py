"""Mutants of the device kernels: that there is one for each barrier and shuffle. Whether the tests find them is what
`python -m tools.gpu_mutants` shows, which takes minutes."""

from __future__ import annotations

import re

from tools import gpu_mutants


def test_every_barrier_and_shuffle_has_a_mutant() -> None:
    texts, mutants = gpu_mutants.mutated_text()
    assert [mutant.number for mutant in mutants] == list(range(len(mutants)))
    for file, text in texts.items():
        if file == "dialect.h":
            continue
        before = (gpu_mutants.TEXT / file).read_text()
        places = len(re.findall(r"\bBARRIER\(\)|\bshuffle_xor\(", before))
        orders = sum(order[0] == file for order in gpu_mutants.ORDERS)
        own = [mutant for mutant in mutants if mutant.file == file]
        assert len(own) == places + orders
        assert not re.search(r"\bBARRIER\(\)|\bshuffle_xor\(", text)
        for mutant in own:
            assert re.search(rf"\b{mutant.number}\b", text)
            changed = before.splitlines()[mutant.line - 1]
            assert {"no barrier": "BARRIER()", "half a warp shuffles": "shuffle_xor("}.get(
                mutant.mistake, ""
            ) in changed
    assert len({mutant.file for mutant in mutants}) >= 6
