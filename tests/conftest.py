"""What all tests share: hypothesis finds the same examples every time, and no example has a clock."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "calm",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("calm")
