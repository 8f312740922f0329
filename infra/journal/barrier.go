package journal

import (
	"context"
	"maps"
	"slices"
	"time"

	"wharf/commands"
)

// barrier makes "nothing happened" a true answer: a call may say so only on a state that contains everything that was
// in the log when the call began. A call joins; the log's end is asked for after that; when the fold has passed this
// end, the call is decided again, and what it then finds is true. One question is under way per partition, and serves
// all who joined before it was asked.
type barrier[S commands.State[S]] struct {
	joined []*call[S] // wait for the next question
	asked  []*call[S] // wait for the end that is being asked for, or for the fold to pass it
	asking bool
	end    int64 // once known, else -1
}

// join lets the call pass the next barrier. A nil call waits for the partition to become ready.
func (p *partition[S]) join(c *call[S]) {
	if c != nil {
		if c.joined {
			return
		}
		c.joined = true
	}
	p.barrier.joined = append(p.barrier.joined, c)
	p.barrier.ask(p)
}

// ask starts a question if there is need for one and none under way.
func (b *barrier[S]) ask(p *partition[S]) {
	if b.asking || len(b.joined) == 0 {
		return
	}
	b.asking, b.end = true, -1
	b.asked, b.joined = b.joined, nil
	go func() {
		end, err := p.askEnd(p.life)
		if err != nil {
			return // the journal is closing
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		b.end = end
		b.passed(p)
	}()
}

func (p *partition[S]) askEnd(ctx context.Context) (int64, error) {
	for {
		end, err := p.Log.End(ctx, p.number)
		if err == nil || ctx.Err() != nil {
			return end, err
		}
		p.Logger.Warn("cannot ask the log for its end", "partition", p.number, "err", err)
		if !pause(ctx, resendDelay) {
			return 0, ctx.Err()
		}
	}
}

// passed lets those go on whose end the fold has passed.
func (b *barrier[S]) passed(p *partition[S]) {
	if !b.asking || b.end < 0 || p.next < b.end || p.halted != nil {
		return
	}
	asked := b.asked
	b.asking, b.asked = false, nil
	for _, c := range asked {
		if c != nil {
			c.proven = true
		} else if !p.ready {
			p.ready = true
			for _, name := range slices.Sorted(maps.Keys(p.lanes)) { // in an order that a simulation can repeat
				p.turn(name)
			}
		}
	}
	for _, c := range asked {
		if c != nil && !c.answered {
			p.turn(c.Stream)
		}
	}
	b.ask(p)
}

// pause waits for d, or returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
