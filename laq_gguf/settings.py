"""Other settings for a cache that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ._lib import load
from .config import LaqConfig
from .errors import LaqArgumentError
from .guard import exclusive

native = load()


class SettingsMixin:
    """set_eviction of `Llama`."""

    @exclusive
    def set_eviction(self: Any, kv_budget: int | float | None = None, **settings: Any) -> None:
        """Other settings from the next prompt on. What was evicted stays so, the cells are those
        of the construction, and nothing is allocated.

        Args:
            kv_budget: as in `Llama`, but for bytes; None: as it is.
            settings: those of laq_gguf.config.LaqConfig: kv_policy, lookahead, lookahead_size,
                window_size and the others, as in `Llama`. What is not given stays.

        Raises:
            TypeError: unknown keyword.
            LaqArgumentError: a value is out of range, or bytes, or the policy cannot recall.
            LaqStateError: the model was made without kv_budget, or is closed.
            LaqNativeError: more lookahead or window than was allocated for, a policy that scores
                after one that does not, values fitted after none were, or an eviction of a
                parked chat waits. Nothing was changed.
        """
        laq = self._attached("set_eviction()")
        if isinstance(kv_budget, str):
            raise LaqArgumentError(
                f"kv_budget={kv_budget!r}: the cells are there already; give tokens (an int) or a "
                "share of n_ctx (a float)"
            )
        config: LaqConfig = replace(self.laq_config, **settings)
        self.recall_config.check_policy(config.kv_policy)
        asked = self.kv_budget if kv_budget is None else kv_budget
        budget = config.resolve_budget(asked, self.n_ctx())
        params, spans = config.to_native(native, budget, self.n_ctx(), self._seed)
        folder = self.recall_config.to_native(native, params)
        laq.flush()  # what an answer shorter than the lookahead left waiting, as it was to be
        laq.set_params(params)
        del spans, folder  # laq_set_params has copied them
        self.laq_config, self.kv_budget, self._asked["kv_budget"] = config, budget, asked
