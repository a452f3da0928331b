"""Another model beside the one that is evaluated, on the same questions: its answers, and what of them differs here."""
