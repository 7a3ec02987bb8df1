"""`pytest -p second_runner`: engines on a CPU have vLLM's second model runner (V2), with its kernels interpreted."""

from experiments import second_runner

second_runner.interpret()


def pytest_sessionfinish():
    assert second_runner.is_used(), "No engine had the second model runner."
