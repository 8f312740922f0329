package web

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"

	"wharf/infra/telemetry"
)

// The limits of a server.
const (
	requestTimeout = 10 * time.Second // of a request, once its body is read: 503 or 504 after that
	drainTimeout   = 15 * time.Second // for requests under way when the program is told to stop
	maxInFlight    = 4096             // requests at a time; beyond: 503
)

var requestSeconds = promauto.NewHistogramVec(prometheus.HistogramOpts{
	Name: "wharf_http_request_seconds", Help: "Time to answer a request.",
	Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
}, []string{"route", "status"})

// Handler is everything around the routes of the mux: /livez, /readyz (ready is nil, or says what is missing),
// /metrics, /openapi.json, limits, time-outs, ETags, tokens, problems for unknown routes, panics, traces.
func Handler(mux *http.ServeMux, document []byte, of Installation, ready func() error) http.Handler {
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			writeProblem(w, notReady(err.Error()))
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET /metrics", telemetry.Metrics())
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(document)
	})
	slots := make(chan struct{}, maxInFlight)
	return otelhttp.NewHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			writeProblem(w, notReady("too many requests at a time"))
			return
		}
		defer func() {
			if p := recover(); p != nil {
				slog.Error("a request panicked", "panic", p, "stack", string(debug.Stack()))
				writeProblem(w, newProblem(http.StatusInternalServerError, "internal"))
			}
		}()
		if path.Clean(r.URL.EscapedPath()) != r.URL.EscapedPath() { // which the mux would redirect
			writeProblem(w, newProblem(http.StatusNotFound, "no-such-path"))
			return
		}
		_, route := mux.Handler(r)
		if route == "" {
			noRoute(w, mux, r)
			return
		}
		if p := badQuery(r); p != nil {
			writeProblem(w, p)
			return
		}
		if p := of.openToken(r); p != nil {
			writeProblem(w, p)
			return
		}
		if preferences := r.Header.Values("Prefer"); len(preferences) > 1 { // a list may come in several lines
			r.Header.Set("Prefer", strings.Join(preferences, ", "))
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		status := serve(mux, of, w, r.WithContext(ctx))
		requestSeconds.WithLabelValues(route, strconv.Itoa(status)).Observe(time.Since(start).Seconds())
	}), "http", otelhttp.WithFilter(traced), otelhttp.WithSpanNameFormatter(func(_ string, r *http.Request) string { return r.Method }))
}

// traced says that the request gets a span: a command does, whose events carry it on, and a query if its caller is traced.
// Nobody asks for any other query's, and making one is a tenth of what answering it takes.
func traced(r *http.Request) bool {
	return r.Method == http.MethodPost || r.Header.Get("traceparent") != ""
}

// badQuery refuses what would otherwise be taken for a query without conditions.
func badQuery(r *http.Request) *Problem {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return newError(http.StatusBadRequest, "the query string cannot be read")
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(query)) {
		if values := query[name]; len(values) > 1 || values[0] == "" {
			errs = append(errs, &huma.ErrorDetail{Location: "query." + name, Message: "expected one value that is not empty"})
		}
	}
	if errs == nil {
		return nil
	}
	return newError(http.StatusUnprocessableEntity, "validation failed", errs...)
}

// noRoute tells an unknown path from a wrong method.
func noRoute(w http.ResponseWriter, mux *http.ServeMux, r *http.Request) {
	var allowed []string
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
		probe := r.Clone(r.Context())
		probe.Method = method
		if _, route := mux.Handler(probe); route != "" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) > 0 {
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		writeProblem(w, newProblem(http.StatusMethodNotAllowed, codes[http.StatusMethodNotAllowed]))
		return
	}
	writeProblem(w, newProblem(http.StatusNotFound, "no-such-path"))
}

func writeProblem(w http.ResponseWriter, p *Problem) {
	for k, v := range p.GetHeaders() {
		w.Header()[k] = v
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

// serve runs the handler and returns the status. The answer to a GET whose handler sets an ETag (the version, in
// quotes) is held back until its body is known: the hash goes into the tag, and an If-None-Match that has it gets 304.
func serve(h http.Handler, of Installation, w http.ResponseWriter, r *http.Request) int {
	b := &recorder{ResponseWriter: w, of: of, hold: r.Method == http.MethodGet || r.Method == http.MethodHead}
	h.ServeHTTP(b, r)
	if !b.held {
		return b.status
	}
	sum := sha256.Sum256(b.body.Bytes())
	version := strings.Trim(w.Header().Get("ETag"), `"`)
	tag := `"` + version + "." + hex.EncodeToString(sum[:8]) + `"`
	w.Header().Set("ETag", tag)
	if match := strings.Join(r.Header.Values("If-None-Match"), ","); match == "*" || strings.Contains(match, tag) {
		w.Header().Del("Content-Type")
		w.WriteHeader(http.StatusNotModified)
		return http.StatusNotModified
	}
	w.WriteHeader(b.status)
	_, _ = w.Write(b.body.Bytes())
	return b.status
}

type recorder struct {
	http.ResponseWriter
	of     Installation
	status int
	hold   bool // if the handler sets an ETag
	held   bool
	body   bytes.Buffer
}

func (b *recorder) WriteHeader(status int) {
	if b.status != 0 {
		return
	}
	b.status = status
	b.of.sealToken(b.Header())
	if status == http.StatusServiceUnavailable && b.Header().Get("Retry-After") == "" {
		b.Header().Set("Retry-After", retryAfter)
	}
	if b.held = b.hold && status == http.StatusOK && b.Header().Get("ETag") != ""; !b.held {
		b.ResponseWriter.WriteHeader(status)
	}
}

func (b *recorder) Write(p []byte) (int, error) {
	if b.status == 0 {
		b.WriteHeader(http.StatusOK)
	}
	if b.held {
		return b.body.Write(p)
	}
	return b.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController reach the connection.
func (b *recorder) Unwrap() http.ResponseWriter { return b.ResponseWriter }

// Serve serves on the listener until ctx ends, then lets the requests under way finish.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	// Requests outlive ctx: they are drained, not cut.
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      60 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve HTTP on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := server.Shutdown(drain); err != nil {
		_ = server.Close()
		return fmt.Errorf("requests were cut after %s: %w", drainTimeout, err)
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
