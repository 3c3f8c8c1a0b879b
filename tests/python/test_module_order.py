"""The check of the module order finds every way of naming a later module."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "check_module_order.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def core(tmp_path: Path) -> Path:
    (tmp_path / "lib.rs").write_text("mod bus;\nmod sync;\nuse crate::bus::Bus;\n")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "use crate::wait::Waiters;",
        "use crate::{error::Lagged, wait};",
        "use crate::{\n    error::{self, Lagged},\n    wait::{Park, Waiters},\n};",
        "fn f() { let w = crate::wait::Waiters::new(); }",
        "use super::wait::Waiters;",
    ],
)
def test_a_use_of_a_later_module_is_found_with_its_line(core: Path, text: str) -> None:
    (core / "policy.rs").write_text(f"// first line\n{text}\n")
    result = check(core)
    assert result.returncode == 1
    line = 2 + text[: text.index("wait")].count("\n")
    assert f"policy.rs:{line}: policy uses wait, which comes later" in result.stdout


@pytest.mark.parametrize(
    "text",
    [
        "use crate::error::Lagged;\nuse crate::{sync::Mutex, topic::Pattern};",
        "// crate::wait would come later\n//! See [`crate::wait`].\n/* crate::bus */",
        "use crate::error::{bus, wait};",
        "use xcrate::wait::Thing;",
    ],
)
def test_uses_of_earlier_modules_and_comments_are_fine(core: Path, text: str) -> None:
    (core / "policy.rs").write_text(text)
    result = check(core)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_module_in_a_folder_has_the_place_of_the_folder(core: Path) -> None:
    (core / "backend").mkdir()
    (core / "backend" / "ring.rs").write_text("use super::bus;\nuse crate::bus::Bus;\n")
    result = check(core)
    assert "ring.rs:2: backend uses bus" in result.stdout
    assert result.stdout.count("\n") == 1


def test_files_of_a_folder_that_need_each_other_are_found(core: Path) -> None:
    ring = core / "ring"
    ring.mkdir()
    (ring / "mod.rs").write_text("mod slots;\nmod reader;\nuse slots::Slots;\n")
    (ring / "slots.rs").write_text("// super::reader\nuse super::{cursor::Cursor, right::Right};\n")
    (ring / "cursor.rs").write_text("mod tests { use super::super::reader::Reader; }\n")
    (ring / "reader.rs").write_text("use super::slots::Slots;\n")
    assert check(core).returncode == 0
    (ring / "cursor.rs").write_text("fn f() { super::reader::read(); }\n")
    result = check(core)
    assert result.returncode == 1
    assert result.stdout.count(" -> ") == 3
    assert "is a circle" in result.stdout
    ring.rename(core / "bus")
    assert check(core).returncode == 0, "one algorithm"


def test_modules_of_one_step_may_use_each_other(core: Path) -> None:
    (core / "bus.rs").write_text("use crate::subscription::Inbox;\n")
    (core / "subscription.rs").write_text("use crate::bus::Shared;\n")
    assert check(core).returncode == 0


def test_a_name_of_the_crate_root_hides_no_module(core: Path) -> None:
    (core / "policy.rs").write_text("use crate::EventBus;\n")
    assert "crate::EventBus hides its module" in check(core).stdout


def test_a_module_outside_the_order_is_an_error(core: Path) -> None:
    (core / "extra.rs").write_text("")
    assert "extra is not in the order" in check(core).stdout


def test_a_folder_without_the_core_is_refused(tmp_path: Path) -> None:
    result = check(tmp_path)
    assert result.returncode == 2
    assert "lib.rs" in result.stderr
