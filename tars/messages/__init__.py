"""What travels: params and results of every method, on HTTP, on a worker's pipe and in the Python client alike.

Law of this package: frozen pydantic models that refuse unknown fields; no behaviour beyond validation.
"""
