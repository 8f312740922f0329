package commands

import (
	"context"
	"encoding/json"
	"regexp"
	"strconv"

	"github.com/danielgtaylor/huma/v2"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/propagation"
)

// Conditions are the headers that every command understands. Embed them in a command's input.
type Conditions struct {
	IdempotencyKey string `header:"Idempotency-Key" maxLength:"255" pattern:"^[!-~]*$" doc:"A retry with the same key gets the first answer and does nothing. Visible ASCII."`
	IfMatch        string `header:"If-Match" doc:"The version that the entity must have, as in an ETag."`

	version int64
}

// entityTag is a version in quotes, or the ETag of a query, of which only the version counts.
var entityTag = regexp.MustCompile(`^"(0|[1-9][0-9]{0,17})(\.[0-9a-f]+)?"$`)

// Resolve reads If-Match. A condition that cannot be read must not be taken for none, and so for the key.
func (c *Conditions) Resolve(ctx huma.Context) (errs []error) {
	lines := map[string]int{}
	ctx.EachHeader(func(name, value string) {
		lines[name]++
		if value == "" && (name == "If-Match" || name == "Idempotency-Key") || lines[name] == 2 && name == "Idempotency-Key" {
			errs = append(errs, &huma.ErrorDetail{Location: "header." + name, Message: "expected one value that is not empty"})
		}
	})
	c.version = AnyVersion
	tag := entityTag.FindStringSubmatch(c.IfMatch)
	switch {
	case lines["If-Match"] == 0:
	case c.IfMatch == "*" && lines["If-Match"] == 1:
		c.version = Existing
	case tag == nil || lines["If-Match"] > 1:
		errs = append(errs, &huma.ErrorDetail{Location: "header.If-Match", Message: `expected one entity tag such as "3"`})
	default:
		c.version, _ = strconv.ParseInt(tag[1], 10, 64)
	}
	return errs
}

// Command is the command to a stream that these headers and the request make. What was asked is the name of the
// command and its parameters.
func (c *Conditions) Command(ctx context.Context, stream, name string, parameters any) (Command, error) {
	asked, err := json.Marshal([]any{name, stream, parameters})
	if err != nil {
		return Command{}, err
	}
	return Command{Stream: stream, Key: c.IdempotencyKey, Request: string(asked), IfMatch: c.version, Trace: traceOf(ctx)}, nil
}

// NewID is the id of the entity that the command creates: made from the key, so that a retry meets the same stream, or
// a random one if there is no key.
func (c *Conditions) NewID(kind string) uuid.UUID {
	if c.IdempotencyKey == "" {
		return uuid.New()
	}
	return uuid.NewSHA1(uuid.NewSHA1(uuid.NameSpaceURL, []byte("wharf:"+kind)), []byte(c.IdempotencyKey))
}

// Accepted is the answer to a command that was accepted, now or on an earlier try.
type Accepted struct {
	Status   int
	Location string `header:"Location"`
	ETag     string `header:"ETag"`
	Token    string `header:"Consistency-Token" doc:"Everything that the command did is public at this position. Opaque."`
	Body     AcceptedBody
}

// AcceptedBody names the entity and its version after the command.
type AcceptedBody struct {
	ID      string `json:"id"`
	Version int64  `json:"version"`
}

// Accept is the answer that the receipt makes.
func Accept(status int, r Receipt, err error) (*Accepted, error) {
	if err != nil {
		return nil, err
	}
	return &Accepted{Status: status, ETag: `"` + strconv.FormatInt(r.Version, 10) + `"`, Token: r.Position.String(),
		Body: AcceptedBody{r.Stream, r.Version}}, nil
}

func traceOf(ctx context.Context) string {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// Price is an amount of money above 0. Numbers stay below 2^53, which every JSON reader keeps exact.
type Price struct {
	Amount   int64  `json:"amount" minimum:"1" maximum:"9007199254740991" doc:"In minor units, such as pence."`
	Currency string `json:"currency" pattern:"^[A-Z]{3}$" patternDescription:"a currency code of three capital letters"`
}

// OrderID is an order's id in a path: a UUID in any letter case, read as lower case.
type OrderID string

// Resolve implements huma.Resolver: huma has checked the form.
func (id *OrderID) Resolve(huma.Context, *huma.PathBuffer) []error {
	if u, err := uuid.Parse(string(*id)); err == nil {
		*id = OrderID(u.String())
	}
	return nil
}

// uuidPattern rather than the format "uuid", whose error would repeat part of the value.
const uuidPattern = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"

// Schema implements huma's documentation.
func (OrderID) Schema(huma.Registry) *huma.Schema {
	s := &huma.Schema{Type: huma.TypeString, Pattern: uuidPattern, PatternDescription: "a UUID"}
	s.PrecomputeMessages()
	return s
}
