"""The contracts' own float64 references as a backend: slow, exact, and what every other backend is judged against."""

requires = ("numpy",)
rank = 0
