//go:build torture && linux

package torture_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

const (
	kill    = "kill"    // with -9, and start it anew after a while
	pause   = "pause"   // for a while
	restart = "restart" // end it in order, and start it anew
)

const (
	shortestPause = 100 * time.Millisecond
	longestDown   = 3 * time.Second // between a kill and the start
)

// tormentor does one thing after the other to the victims.
type tormentor struct {
	victims []*victim
	random  *rand.Rand
	every   time.Duration // on average
	longest time.Duration // pause
	say     func(format string, args ...any)

	// What others need is being tortured: until that is over a program that ends itself, or in disorder, has a reason.
	away  atomic.Int32
	times atomic.Int32

	mu    sync.Mutex
	done  map[string]map[string]int // by kind of victim, and of what was done to it
	busy  map[*victim]bool
	fault error // the first that makes the test fail
}

// run does things to random victims until ctx ends, and returns when all of them are well again.
func (t *tormentor) run(ctx context.Context) error {
	var all sync.WaitGroup
	for {
		// The seed alone decides what is tried, and when; a victim that has not yet recovered is passed over.
		wait := time.Duration(t.random.ExpFloat64() * float64(t.every))
		v, what := t.victims[t.random.IntN(len(t.victims))], [...]string{kill, kill, pause, pause, restart}[t.random.IntN(5)]
		// As many pauses are shorter than the geometric mean of the shortest and the longest as are longer.
		length := time.Duration(float64(shortestPause) *
			math.Pow(float64(t.longest)/float64(shortestPause), t.random.Float64()))
		down := time.Duration(t.random.Float64() * float64(longestDown))
		select {
		case <-ctx.Done():
			all.Wait()
			return t.fault
		case <-time.After(wait):
		}
		if !t.take(v, what) {
			continue
		}
		all.Go(func() {
			defer t.give(v)
			began := time.Now()
			if err := t.do(ctx, v, what, length, down); err != nil {
				t.say("%s %s: %v", what, v.name, err)
				t.mu.Lock()
				if t.fault == nil {
					t.fault = fmt.Errorf("%s %s: %w", what, v.name, err)
				}
				t.mu.Unlock()
				return
			}
			t.say("%s %s: well after %s", what, v.name, time.Since(began).Round(time.Millisecond))
			// It gets some time to work, or it would never come to anything.
			sleep(ctx, time.Since(began))
		})
	}
}

func (t *tormentor) take(v *victim, what string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy[v] {
		return false
	}
	t.busy[v] = true
	if t.done[v.kind] == nil {
		t.done[v.kind] = map[string]int{}
	}
	t.done[v.kind][what]++
	return true
}

func (t *tormentor) give(v *victim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busy[v] = false
}

// needed says that other programs cannot do their work without it.
func (v *victim) needed() bool { return v.kind == "kafka" || v.kind == "postgres" }

// do does it, and returns when the victim is well again. Whatever ctx says, it ends with a victim that runs.
func (t *tormentor) do(ctx context.Context, v *victim, what string, length, down time.Duration) error {
	t.say("%s %s", what, v.name)
	well := context.WithoutCancel(ctx)
	if v.needed() {
		t.times.Add(1)
		t.away.Add(1)
		defer t.away.Add(-1)
	}
	switch what {
	case pause:
		v.pause()
		sleep(ctx, length)
		v.resume()
		return v.await(well)
	case kill:
		if err := v.kill(); err != nil {
			return err
		}
		sleep(ctx, down)
	case restart:
		undisturbed := t.away.Load() == 0
		times := t.times.Load()
		if err := v.stop(); err != nil {
			if v.needed() || undisturbed && times == t.times.Load() {
				return err
			}
			t.say("%v; something that it needs was away", err)
		}
	}
	if err := v.start(well); err != nil {
		return err
	}
	return v.await(well)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
