"""One forward pass of an attached model: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_softprompt.attachment import caches
from lightning_softprompt.attachment.layout import Layout
from lightning_softprompt.attachment.loss import Scoring
from lightning_softprompt.attachment.substitution import Substitution
from lightning_softprompt.base.traits import ModelTraits


class ForwardPass(Substitution):
    """The arguments of a call as the model is to have them, and its outputs as the caller is to have them.

    Args:
        traits: of the model.
        arguments: what was given, by name.
        cache: the one among it, or a new one, or None.

    Attributes:
        arguments: by name, as the model is to have them.
        cache: as above.
        layout: the layout of the columns the model sees; None where no row has a prompt.
        scoring: what of it is scored here; None where nothing is.
    """

    def __init__(
        self, traits: ModelTraits, arguments: Mapping[str, Any], cache: Any, layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.traits = traits
        self.arguments = dict(arguments)
        self.cache = cache
        self.layout = layout
        self.scoring: Scoring | None = None
        wanted = self.arguments.get("return_dict")
        self._as_tuple = not (getattr(traits.model.config, "return_dict", True) if wanted is None else wanted)
        if self._as_tuple:
            self.arguments["return_dict"] = True

    def finish(self, output: Any) -> Any:
        """Turn what the model put out into what the caller gets."""
        returned = caches.find(output)
        caches.remember(self.cache if returned is None else returned, self.layout)
        found = self._found(output)
        if found:
            # An output of transformers keeps the keys, and their order, that it was made with; so a new one is made.
            output = type(output)(**{**{each.name: getattr(output, each.name) for each in fields(output)}, **found})
        return output.to_tuple() if self._as_tuple else output

    def _found(self, output: Any) -> dict[str, Any]:
        """The outputs that differ from what the model put out, by name."""
        return {} if self.scoring is None else self.scoring.of_output(output, self)

    def _score(self, scoring: Scoring) -> None:
        self.scoring, self.scored = scoring, scoring.positions
        for name in scoring.unwanted:
            self.arguments.pop(name, None)
