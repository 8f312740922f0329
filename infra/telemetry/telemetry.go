// Package telemetry answers the question "how does one see what a program does?": logs, traces and metrics are set up
// here, once, at the start of every program. Logs go to standard error and name the trace that they belong to. Traces
// are made for every command, and for a query whose caller has one, and are passed on through HTTP, commits and events in the
// header "traceparent". Metrics are in Prometheus's default registry.
package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Setup makes the log, as "text" or "json" and from the level on, the default of package slog, and the traces the
// default of package otel. The options are for who wants the traces to be seen: by an exporter, for example. The
// result ends what Setup began, and hands on what is still waiting for an exporter; ctx bounds that.
func Setup(
	w io.Writer, level slog.Level, format string, opts ...sdktrace.TracerProviderOption,
) (shutdown func(ctx context.Context) error, err error) {
	options := &slog.HandlerOptions{Level: level}
	var h slog.Handler
	switch format {
	case "text":
		h = slog.NewTextHandler(w, options)
	case "json":
		h = slog.NewJSONHandler(w, options)
	default:
		return nil, fmt.Errorf("a log is text or json, not %q", format)
	}
	slog.SetDefault(slog.New(handler{h}))
	if len(opts) == 0 {
		// Nobody would see the spans: make the ids and pass them on, but record only what a caller has sampled.
		opts = append(opts, sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample())))
	}
	provider := sdktrace.NewTracerProvider(opts...)
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	return provider.Shutdown, nil
}

// Metrics serves the metrics of this process, for Prometheus.
func Metrics() http.Handler { return promhttp.Handler() }

// handler adds the trace and span of the context to each record.
type handler struct{ slog.Handler }

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		r.AddAttrs(slog.String("trace_id", span.TraceID().String()), slog.String("span_id", span.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.Handler.WithAttrs(attrs)}
}

func (h handler) WithGroup(name string) slog.Handler { return handler{h.Handler.WithGroup(name)} }
