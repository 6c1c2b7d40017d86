"""When a network answers and when it says "I don't know", chosen on its hold-out."""
