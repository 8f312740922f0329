package journal

import "time"

// When several replicas write to one stream as fast as they can, each commit that counts makes those of the others
// lose. Safety does not mind, but the work is wasted, and so they take turns, by what each of them sees in the log and
// without a word between them: whoever loses waits until the stream is quiet, and whoever goes on winning while others
// wait stops after a while. Whoever has waited for too long tries a few times without waiting, until it has won. Most of it
// is measured in the time that a commit takes.
const (
	quiet     = 2                      // commit times without a commit of others, before the stream is tried again;
	quietMore = 4                      // and up to as many more, by chance
	yield     = 2 + quiet + quietMore  // commit times that one who stops leaves to the others
	longTurn  = 100 * time.Millisecond // of winning, until one stops
	longWait  = 5 * longTurn           // for quiet; then the stream is tried all the same,
	contend   = 4                      // times in a row, if need be, until that succeeds
	minded    = time.Second            // for how long others are minded after they were seen, or longer
)

// contest is a stream that another replica writes to as well. It outlives the lane: a client that sends one command
// after the other leaves it empty in between.
type contest struct {
	rival time.Time // when another replica was last seen to write
	since time.Time // our commits have followed each other since then; zero when they have not
}

// rival notes that another replica writes to the stream.
func (p *partition[S]) rival(name string) *contest {
	c := p.contests[name]
	if c == nil {
		for old, c := range p.contests { // there are few
			if p.settled(c) {
				delete(p.contests, old)
			}
		}
		c = &contest{}
		p.contests[name] = c
	}
	c.rival = time.Now()
	return c
}

func (p *partition[S]) settled(c *contest) bool {
	return time.Since(c.rival) > max(minded, 4*yield*p.commitTime())
}

// lost notes that a commit of another replica was accepted. If anything waits, it goes on waiting until that one is
// done, but not for ever.
func (p *partition[S]) lost(name string, l *lane[S]) {
	p.rival(name).since = time.Time{}
	if len(l.queue) == 0 {
		return
	}
	unit := p.commitTime()
	p.rest(name, l, quiet*unit+p.chance(quietMore*unit))
}

// won notes that a commit of ours was accepted, and stops when others have waited long enough.
func (p *partition[S]) won(name string, l *lane[S]) {
	c, now := p.contests[name], time.Now()
	l.patience, l.contended = time.Time{}, 0
	switch {
	case c == nil:
	case p.settled(c):
		delete(p.contests, name)
	case c.since.IsZero():
		c.since = now
	case now.Sub(c.since) > max(longTurn, yield*p.commitTime()):
		c.since = time.Time{}
		p.rest(name, l, yield*p.commitTime()+p.chance(p.commitTime()))
	}
}

// measure takes note of how long a commit took from its proposal to its fate.
func (p *partition[S]) measure(took time.Duration) {
	if p.took == 0 {
		p.took = took
	}
	p.took += (took - p.took) / 8
}

// commitTime is how long a commit takes, lately. It has limits, for a log that was out of reach tells nothing.
func (p *partition[S]) commitTime() time.Duration {
	return min(max(p.took, time.Millisecond), longTurn)
}

func (p *partition[S]) chance(most time.Duration) time.Duration {
	return time.Duration(p.Jitter(int64(most)))
}

// rest leaves the stream alone for the time, from now on; or not at all when what waits has no patience left.
func (p *partition[S]) rest(name string, l *lane[S], d time.Duration) {
	// A replica that is nearer to the log than this one would win every time.
	if l.patience.IsZero() || l.contended == contend {
		l.patience, l.contended = time.Now().Add(max(longWait, 4*yield*p.commitTime())+p.chance(longTurn)), 0
	}
	left := time.Until(l.patience)
	if left <= 0 {
		l.contended++
		return
	}
	d = min(d, left)
	if l.pause != nil {
		l.pause.Reset(d)
		return
	}
	var t *time.Timer
	t = time.AfterFunc(d, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l.pause == t { // else it has ended twice: it was set again when it had just ended
			l.pause = nil
			p.turn(name)
			p.tidy(name, l)
		}
	})
	l.pause = t
}
