-- version: moonlet's own.
return "0.1.0"
