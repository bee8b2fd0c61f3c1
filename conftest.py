"""Prints, at the end of a test run, how far each backend's scan is from the brute-force reference."""
import pytest
import torch

torch.set_num_threads(1)    # the tensors are tiny: a second thread costs more than it gives
SCAN_ERRORS = {}            # (backend, device, dtype) -> {length: largest relative error}


@pytest.fixture
def record_scan_error():
    def record(run, length, error):
        row = SCAN_ERRORS.setdefault(run, {})
        row[length] = max(error, row.get(length, 0.0))
    return record


def pytest_terminal_summary(terminalreporter):
    if SCAN_ERRORS:
        lengths = sorted({length for row in SCAN_ERRORS.values() for length in row})
        terminalreporter.section("selective scan: largest relative error of outputs and gradients, by length")
        terminalreporter.write_line(f"{'backend':24}" + "".join(f"{length:>10}" for length in lengths))
        for run, row in SCAN_ERRORS.items():
            cells = (f"{row[length]:10.1e}" if length in row else " " * 10 for length in lengths)
            terminalreporter.write_line(f"{' '.join(run):24}" + "".join(cells))
