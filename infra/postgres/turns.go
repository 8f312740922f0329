package postgres

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// How many tasks of a build read and write rows at a time: so an event of a quiet shop is seen at once, and a busy shop has few,
// large transactions. Nobody waits for the previous build.
const (
	liveWriters     = 2
	previousWriters = 1
)

// turns are those of one build's tasks at its rows. They are given in the order in which they were asked for. Each live build, and
// each previous one, has its own: one whose rows are locked holds up no other.
type turns struct{ *semaphore.Weighted }

func newTurns(writers int64) *turns { return &turns{semaphore.NewWeighted(writers)} }

// turn is one that was asked for.
type turn struct {
	turns *turns
	given chan error
}

func (ts *turns) ask(ctx context.Context) *turn {
	t := &turn{ts, make(chan error, 1)}
	go func() { t.given <- ts.Acquire(ctx, 1) }()
	return t
}

// granted has the error when there is no turn any more; it is nil when none was asked for.
func (t *turn) granted() <-chan error {
	if t == nil {
		return nil
	}
	return t.given
}

// end passes the turn on.
func (t *turn) end() { t.turns.Release(1) }

// giveUp gives back a turn that has not been taken, after its ctx has ended.
func (t *turn) giveUp() {
	if err := <-t.given; err == nil {
		t.end()
	}
}
