package postgres

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// writers is how many tasks of a read model read and write rows at a time: so an event of a quiet shop is seen at once,
	// and a busy shop has few, large transactions.
	writers     = 2
	longestRest = 100 * time.Millisecond
)

// turns are those of one read model's tasks at its rows. They are given in the order in which they were asked for. Each
// read model has its own: one whose rows are locked holds up no other.
type turns struct {
	*semaphore.Weighted

	mu       sync.Mutex
	quickest time.Duration // turn, lately
}

func newTurns() *turns { return &turns{Weighted: semaphore.NewWeighted(writers)} }

// turn is one that was asked for.
type turn struct {
	given chan error
	began time.Time
	turns *turns
}

func (ts *turns) ask(ctx context.Context) *turn {
	t := &turn{given: make(chan error, 1), turns: ts}
	go func() {
		err := ts.Acquire(ctx, 1)
		t.began = time.Now()
		t.given <- err
	}()
	return t
}

// granted has the error when there is no turn any more; it is nil when none was asked for.
func (t *turn) granted() <-chan error {
	if t == nil {
		return nil
	}
	return t.given
}

// end passes the turn on: at once when there is much to catch up with or the machine is not busy, or else after as much
// time as the turn took longer than they do when it is not. More comes together meanwhile, in one transaction.
func (t *turn) end(behind bool) {
	rest := t.turns.slowness(time.Since(t.began))
	if behind || rest <= 0 {
		t.turns.Release(1)
		return
	}
	time.AfterFunc(min(rest, longestRest), func() { t.turns.Release(1) })
}

// slowness is how much longer a turn took than the quickest, lately.
func (ts *turns) slowness(took time.Duration) time.Duration {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if ts.quickest == 0 || took < ts.quickest {
		ts.quickest = took
	}
	slow := took - ts.quickest
	ts.quickest += slow / 256 // or one that was quick by chance would count for ever
	return slow
}

// giveUp gives back a turn that has not been taken, after its ctx has ended.
func (t *turn) giveUp() {
	if err := <-t.given; err == nil {
		t.turns.Release(1)
	}
}
