"""How fast is a backend, against the limit of the machine and against the others?"""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")
