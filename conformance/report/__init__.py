"""What a run found, in every form: results, levels reached, waivers, JSON, JUnit, table, pages."""
