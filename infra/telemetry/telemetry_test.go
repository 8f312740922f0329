package telemetry

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
)

func TestLogsAndHeadersNameTheTrace(t *testing.T) {
	before := slog.Default()
	t.Cleanup(func() { slog.SetDefault(before) })
	if _, err := Setup(nil, slog.LevelInfo, "xml"); err == nil {
		t.Error("it logs XML")
	}
	var out bytes.Buffer
	shutdown, err := Setup(&out, slog.LevelWarn, "json")
	if err != nil {
		t.Fatal(err)
	}
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	from := propagation.MapCarrier{"traceparent": "00-" + trace + "-00f067aa0ba902b7-01"}
	ctx, span := otel.Tracer("test").Start(otel.GetTextMapPropagator().Extract(t.Context(), from), "work")
	defer span.End()
	slog.InfoContext(ctx, "too quiet to hear")
	slog.With("part", "test").WarnContext(ctx, "loud")

	var record map[string]any
	if err := json.Unmarshal(out.Bytes(), &record); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	if record["trace_id"] != trace || record["part"] != "test" {
		t.Errorf("the log says %s", &out)
	}
	to := propagation.MapCarrier{}
	otel.GetTextMapPropagator().Inject(ctx, to)
	want := "00-" + trace + "-" + record["span_id"].(string) + "-01"
	if to["traceparent"] != want || want == from["traceparent"] {
		t.Errorf("passed on: %s, want %s", to["traceparent"], want)
	}
	if err := shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestMetricsOfTheProcess(t *testing.T) {
	w := httptest.NewRecorder()
	Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "go_goroutines") {
		t.Errorf("%d: %.200s", w.Code, w.Body)
	}
}
