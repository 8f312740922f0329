package projections

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"wharf/domain"
)

// Positions knows how far the live read models are.
type Positions interface {
	// Wait returns nil once the live build of the read model has seen the event at the position, or a *BehindError when it
	// has waited for so long, or ctx has ended, or the error of what it asks. It looks at least once, if it is answered.
	Wait(ctx context.Context, model string, p domain.Position, most time.Duration) error
}

// BehindError says that a read model did not come to a position in time.
type BehindError struct {
	Model  string
	Wanted domain.Position
	Seen   int64 // events of that partition
	Halted bool  // it does not go on by itself
}

func (e *BehindError) Error() string {
	text := fmt.Sprintf("the read model %s has seen %d events of %s partition %d, and not yet event %d",
		e.Model, e.Seen, e.Wanted.Topic, e.Wanted.Partition, e.Wanted.Seq)
	if e.Halted {
		text += "; it is halted there, and waits for help (GET /projections says why)"
	}
	return text
}

// How long a query waits for a position, unless it says otherwise, and at most.
const (
	defaultWait = 2 * time.Second
	maxWait     = 8 * time.Second // less than a request may take
)

// Consistency are the headers by which a query reads its caller's writes. Embed it in a query's input.
type Consistency struct {
	Token  string `header:"Consistency-Token" maxLength:"400" doc:"Of a command: the answer will contain what it did, on any replica, or say that it is stale where that could not be applied; or 503 if it takes too long. Opaque."`
	Prefer string `header:"Prefer" maxLength:"200" doc:"wait=N: for how many seconds to wait for the token's position, 2 if not given, 8 at most."`

	position domain.Position
	wait     time.Duration
}

var preferWait = regexp.MustCompile(`(?i)(?:^|[,;\s])wait\s*=\s*"?([0-9]+)"?\s*(?:$|[,;])`)

// Resolve implements huma.Resolver.
func (c *Consistency) Resolve(ctx huma.Context) []error {
	c.wait = defaultWait
	if found := preferWait.FindStringSubmatch(c.Prefer); found != nil { // other preferences are not for us to judge
		c.wait = maxWait
		if n, err := strconv.Atoi(found[1]); err == nil && n < int(maxWait/time.Second) {
			c.wait = time.Duration(n) * time.Second
		}
	}
	if c.Token == "" {
		return nil
	}
	parts := strings.Split(c.Token, "/")
	if len(parts) == 3 && slices.Contains(Topics, parts[0]) {
		p, err1 := strconv.ParseUint(parts[1], 10, 31)
		seq, err2 := strconv.ParseUint(parts[2], 10, 63)
		if err1 == nil && err2 == nil {
			c.position = domain.Position{Topic: parts[0], Partition: int32(p), Seq: int64(seq)}
			return nil
		}
	}
	return []error{&huma.ErrorDetail{Location: "header.Consistency-Token", Message: "expected what a command has answered"}}
}

// await waits until the read model has seen what the token stands for.
func (c *Consistency) await(ctx context.Context, m Model, p Positions) error {
	if !slices.Contains(m.Topics, c.position.Topic) {
		return nil // no token, or one of what the read model does not listen to
	}
	return p.Wait(ctx, m.Name, c.position, c.wait)
}

// awaiting is the input of a query that embeds Consistency.
type awaiting[I any] interface {
	*I
	await(context.Context, Model, Positions) error
}

// read registers a query of one read model, which first waits for what its caller has written.
func read[I any, P awaiting[I], O any](api huma.API, r Reads, m Model, op huma.Operation, query func(context.Context, *I) (*O, error)) {
	huma.Register(api, op, func(ctx context.Context, in *I) (*O, error) {
		if err := P(in).await(ctx, m, r.Positions); err != nil {
			return nil, err
		}
		return query(ctx, in)
	})
}
