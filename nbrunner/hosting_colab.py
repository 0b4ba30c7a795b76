"""Colab's terms for hosting from its machines."""

from __future__ import annotations

import os
import sys

from nbrunner.errors import UserInputError

RULES = (
    "Google Colab's free machines are for interactive work. Its FAQ (research.google.com/colaboratory/faq.html) "
    "disallows, among others, file hosting and serving media, connecting to remote proxies, mining, and 'other web "
    "service offerings not related to interactive compute'; running distributed computing workers is disallowed on "
    "free machines. Colab may end the session or close the account. What is allowed changes: read the FAQ first."
)


def on_colab() -> bool:
    """Whether this process is a notebook on Colab."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def check_colab(*, private: bool, seconds: float | None, consent: bool) -> None:
    """On Colab: `UserInputError` without consent, a private swarm and an end; elsewhere nothing.

    Every swarm is private today: whoever joins holds an invite of its creator.
    """
    if not on_colab():
        return
    if not private:
        raise UserInputError("on Colab only private swarms may be hosted: pass an invite. " + RULES)
    if not consent:
        raise UserInputError(
            RULES
            + " If you have read that, and use a paid machine or your own runtime where it is allowed, say so: "
            "--colab-consent in %host, consent=True in nbrunner.serve()."
        )
    if seconds is None:
        raise UserInputError(
            "on Colab a server must say when it ends: --for 1h in %host, for_='1h' in nbrunner.serve()"
        )
