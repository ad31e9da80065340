"""The API process: HTTP, text and admission; knows neither torch nor the engine."""
