package web

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"

	"wharf/commands"
	"wharf/domain"
	"wharf/projections"
)

// Problem is the one shape of every error: RFC 9457. It names fields, and never repeats a value that was sent.
type Problem struct {
	Type   string  `json:"type" doc:"Stable: urn:wharf:problem: and a code." example:"urn:wharf:problem:order-shipped"`
	Title  string  `json:"title"`
	Status int     `json:"status"`
	Detail string  `json:"detail,omitempty" doc:"For people."`
	Errors []Field `json:"errors,omitempty" doc:"What is wrong with which field."`

	retryAfter string
}

// Field says what is wrong with one field of a request, and what would be right.
type Field struct {
	Field   string `json:"field" example:"body.lines[3].quantity"`
	Message string `json:"message" example:"expected number >= 1"`
}

// Error implements error.
func (p *Problem) Error() string { return p.Title }

// GetStatus implements huma.StatusError.
func (p *Problem) GetStatus() int { return p.Status }

// GetHeaders implements huma.HeadersError.
func (p *Problem) GetHeaders() http.Header {
	h := http.Header{}
	if p.retryAfter != "" {
		h.Set("Retry-After", p.retryAfter)
	}
	return h
}

// ContentType implements huma.ContentTypeFilter.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// table translates the errors that cross the edge. The first that matches (errors.Is) counts; a business refusal that
// is not listed is a 409 with its own code.
var table = []struct {
	err    error
	status int
	code   string
}{
	{domain.ErrUnknown, http.StatusNotFound, "unknown"},
	{domain.ErrOverflow, http.StatusUnprocessableEntity, "amount-too-large"},
	{commands.ErrKeyReused, http.StatusUnprocessableEntity, "idempotency-key-reused"},
	{commands.ErrPrecondition, http.StatusPreconditionFailed, "precondition-failed"},
	{commands.ErrConflict, http.StatusConflict, "conflict"},
	{commands.ErrTooLarge, http.StatusRequestEntityTooLarge, "too-large"},
	{commands.ErrQuarantined, http.StatusConflict, "quarantined"},
	{commands.ErrUnknownOutcome, http.StatusGatewayTimeout, "outcome-unknown"},
	{commands.ErrNotReady, http.StatusServiceUnavailable, "not-ready"},
}

// problemOf translates one error.
func problemOf(err error) *Problem {
	for _, row := range table {
		if errors.Is(err, row.err) {
			p := newProblem(row.status, row.code)
			p.Detail = row.err.Error()
			return p
		}
	}
	var refusal *domain.Refusal
	if errors.As(err, &refusal) {
		p := newProblem(http.StatusConflict, refusal.Code)
		p.Detail = refusal.Error()
		return p
	}
	var behind *projections.BehindError
	if errors.As(err, &behind) {
		p := newProblem(http.StatusServiceUnavailable, "behind")
		p.Detail = behind.Error()
		return p
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return notReady("it took too long")
	}
	if unreachable(err) {
		slog.Warn("a request failed because a server that it needs is away", "err", err)
		return notReady("a server that this one needs, its database or Kafka, does not answer")
	}
	slog.Error("a request failed", "err", err)
	if unknown(err) {
		return notReady("the read model is not there, or is not the one that this program knows: GET /projections says more")
	}
	return newProblem(http.StatusInternalServerError, "internal")
}

// unknown says that the database has no such table or column: somebody has dropped it, or a newer program's is there.
func unknown(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "42P01" || pg.Code == "42703")
}

// unreachable says that a database (or whatever is asked over a network) is away, starting, stopping, full or changing: that is
// no fault of the request's, which may be made again.
func unreachable(err error) bool {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		class := pg.Code[:min(2, len(pg.Code))]
		// Connection, resources, operator; and a statement that was prepared before the read model's columns changed, which is
		// prepared anew.
		return class == "08" || class == "53" || class == "57" || strings.Contains(pg.Message, "cached plan must not change")
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) || pgconn.Timeout(err) || pgconn.SafeToRetry(err) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, puddle.ErrClosedPool)
}

// retryAfter is when a request that was answered with 503 may be made again, in seconds.
const retryAfter = "1"

func newProblem(status int, code string) *Problem {
	p := &Problem{Type: "urn:wharf:problem:" + code, Title: http.StatusText(status), Status: status}
	if status == http.StatusServiceUnavailable {
		p.retryAfter = retryAfter
	}
	return p
}

// notReady says why a request has to be made again.
func notReady(why string) *Problem {
	p := newProblem(http.StatusServiceUnavailable, "not-ready")
	p.Detail = why
	return p
}

// codes are the problems that huma finds by itself.
var codes = map[int]string{
	http.StatusBadRequest:            "malformed",
	http.StatusNotFound:              "unknown",
	http.StatusMethodNotAllowed:      "method-not-allowed",
	http.StatusNotAcceptable:         "not-acceptable",
	http.StatusRequestTimeout:        "request-timeout",
	http.StatusRequestEntityTooLarge: "too-large",
	http.StatusUnsupportedMediaType:  "unsupported-media-type",
	http.StatusUnprocessableEntity:   "invalid",
}

// newError is huma's constructor of errors: it is given its own findings with a status, and a handler's error with 500.
func newError(status int, message string, errs ...error) *Problem {
	if message == "cannot read request body" {
		status = http.StatusBadRequest // the client broke off, or its chunks are none
		errs = nil
	}
	if status == http.StatusInternalServerError && len(errs) == 1 {
		return problemOf(errs[0])
	}
	code, known := codes[status]
	if !known {
		code = "error"
	}
	p := newProblem(status, code)
	p.Detail = message
	if status == http.StatusUnsupportedMediaType {
		p.Detail = "expected application/json"
		return p
	}
	for _, err := range errs {
		if len(p.Errors) == maxFields {
			p.Detail = "validation failed; these are the first errors"
			break
		}
		var f Field
		// An ErrorDetail's own text has the value in it, all of it.
		if d := huma.ErrorDetailer(nil); errors.As(err, &d) {
			f = Field{d.ErrorDetail().Location, d.ErrorDetail().Message}
		} else if err != nil {
			f.Message = err.Error()
		}
		if f.Field = cut(f.Field); !slices.Contains(p.Errors, f) && f != (Field{}) {
			p.Errors = append(p.Errors, f)
		}
	}
	return p
}

// The names of fields may be the sender's, as many and as long as the body allows.
const (
	maxFields = 20
	maxName   = 100
)

func cut(name string) string {
	if len(name) <= maxName {
		return name
	}
	return strings.ToValidUTF8(name[:maxName], "") + "…"
}
