package kafka

import "sync"

// gatherer makes few requests to one broker of many calls: those that come while a request is under way share the next
// one. Who is alone waits for nobody.
type gatherer[Q any] struct {
	c    *Client
	send func([]Q) // makes one request, and answers all

	mu      sync.Mutex
	waiting []Q
	busy    bool
}

// gathered is how many calls share a request at most, which bounds its size.
const gathered = 32

// gather is the gatherer of that name, which sends as the first who asked for it said.
func gather[Q any](c *Client, all map[string]*gatherer[Q], name string, send func([]Q)) *gatherer[Q] {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := all[name]
	if g == nil {
		g = &gatherer[Q]{c: c, send: send}
		all[name] = g
	}
	return g
}

// add is ErrClosed, or the call will be answered.
func (g *gatherer[Q]) add(q Q) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.busy {
		if !g.c.enter() {
			return ErrClosed
		}
		g.busy = true
		go g.run()
	}
	g.waiting = append(g.waiting, q)
	return nil
}

func (g *gatherer[Q]) run() {
	defer g.c.wg.Done()
	for {
		g.mu.Lock()
		n := min(len(g.waiting), gathered)
		qs := g.waiting[:n:n]
		g.waiting = g.waiting[n:]
		g.busy = n > 0
		g.mu.Unlock()
		if n == 0 {
			return
		}
		g.send(qs)
	}
}
