"""Answers requests as the application behind nginx. OpenTelemetry's instrumentation traces it, without code of its own:

pip install flask opentelemetry-distro[otlp] opentelemetry-instrumentation-flask
OTEL_SERVICE_NAME=application opentelemetry-instrument flask --app application.py run
"""

from flask import Flask

app = Flask(__name__)


@app.get("/users/<int:number>")
def user(number: int) -> dict[str, object]:
    return {"number": number, "name": f"User {number}"}
