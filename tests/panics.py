"""What libraries in Rust raise."""


class PanicException(BaseException):
    """As `pyo3_runtime.PanicException`: no Exception, and in no module that could be imported."""
