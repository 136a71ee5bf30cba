"""Tests of `lightning_softprompt.attachment`. A helper that fails says which values it compared."""

import pytest

pytest.register_assert_rewrite("tests.attachment.helpers")
