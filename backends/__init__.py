"""One folder per chip, found by its name; each sees contracts only through porthal.hal."""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")
