//go:build torture && linux

package torture_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"wharf/domain/inventory"
	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/shop"
)

const (
	hotSKUs  = 24
	coldSKUs = 2000
	coldOne  = 16 // of so many commands goes to a cold SKU

	// A stream remembers its last 128 keys, so no command may be sent again after so many others were accepted. Others
	// are those that were under way when it was first sent, and those that came while it could still be sent, or was on
	// its way in a process that is paused: a SKU takes no new command that is so much younger than the oldest of them.
	window = journal.KeysPerStream / 2

	hedge     = time.Second // without an answer, the other replica is asked as well
	repeatOne = 10          // of so many commands is sent again when it was answered
	refuseOne = 50          // of so many asks for what cannot be
	tooMuch   = 1_000_000_000
)

// answer is what a command was told.
type answer struct {
	status          int
	body, tag, mark string
}

// done says that the answer is final: a retry has to get the same.
func (a answer) done() bool {
	return a.status == http.StatusOK || a.status == http.StatusConflict && !strings.Contains(a.body, `problem:conflict"`)
}

// passing says that the command may be sent again.
func (a answer) passing() bool {
	switch a.status {
	case 0, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusConflict:
		return !a.done()
	}
	return false
}

// command is one that is to be done once.
type command struct {
	on      *sku
	slot    int64
	key     string
	path    string
	body    string
	receive bool
	units   int64

	mu      sync.Mutex
	final   answer       // status 0: none yet
	pending atomic.Int32 // whatever may still send it
}

// sku is a stock item that nobody else knows, and what its commands were told.
type sku struct {
	name string

	mu                 sync.Mutex
	created            bool           // a command to it was accepted
	next               int64          // slot
	open               map[int64]bool // slots of commands that may still be sent
	received, adjusted int64          // acknowledged units
	acked              []*command     // by version - 1
	twice              int            // commands that were told a version that another one had been told
}

// take gives a slot to a new command, if one is free.
func (s *sku) take() (slot int64, creating, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.created && len(s.open) > 0 {
		return 0, false, false // an adjustment would not find it
	}
	for n := range s.open {
		if s.next-n >= window {
			return 0, false, false
		}
	}
	slot = s.next
	s.next++
	s.open[slot] = true
	return slot, !s.created, true
}

func (s *sku) give(slot int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, slot)
}

// clients send keyed commands to SKUs of their own, straight to the replicas of inventory.
type clients struct {
	inventory *replicas
	http      *http.Client
	say       func(format string, args ...any)
	skus      []*sku
	all       sync.WaitGroup // everything that may still send

	accepted, refused, retries, repeats, late, differing, wrong atomic.Int64

	mu       sync.Mutex
	findings []string
}

func newClients(inventory *replicas, say func(format string, args ...any)) *clients {
	c := &clients{inventory: inventory, say: say, http: &http.Client{Transport: transport(0)}}
	for i := range hotSKUs + coldSKUs {
		c.skus = append(c.skus, &sku{name: fmt.Sprintf("TORTURE-%04d", i), open: map[int64]bool{}})
	}
	return c
}

// find notes something that must not be. The run's log has all of it, the end of the test the first few.
func (c *clients) find(format string, args ...any) {
	finding := fmt.Sprintf(format, args...)
	c.say("FOUND %s", finding)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.findings) < 20 {
		c.findings = append(c.findings, finding)
	}
}

// run sends commands, so many at a time, until ctx ends, and returns when all of them have been answered.
func (c *clients) run(ctx context.Context, concurrency int) {
	for range concurrency {
		c.all.Go(func() {
			for ctx.Err() == nil {
				if cmd := c.make(); cmd != nil {
					c.do(ctx, cmd)
					continue
				}
				time.Sleep(time.Millisecond) // all SKUs that were looked at are full
			}
		})
	}
	c.all.Wait()
}

// make makes a command up.
func (c *clients) make() *command {
	for range 8 {
		s := c.skus[rand.IntN(hotSKUs)]
		if rand.IntN(coldOne) == 0 {
			s = c.skus[hotSKUs+rand.IntN(coldSKUs)]
		}
		slot, creating, ok := s.take()
		if !ok {
			continue
		}
		cmd := &command{on: s, slot: slot, key: uuid.NewString(), receive: true, units: 2 + rand.Int64N(1000)}
		switch {
		case creating:
		case rand.IntN(refuseOne) == 0:
			cmd.receive, cmd.units = false, -tooMuch
		case rand.IntN(3) == 0:
			cmd.receive, cmd.units = false, []int64{-2, -1, 1, 2}[rand.IntN(4)]
		}
		if cmd.receive {
			cmd.path, cmd.body = "/receive", fmt.Sprintf(`{"quantity":%d}`, cmd.units)
		} else {
			cmd.path, cmd.body = "/adjust", fmt.Sprintf(`{"delta":%d,"reason":"torture"}`, cmd.units)
		}
		cmd.path = "/stock/" + s.name + cmd.path
		return cmd
	}
	return nil
}

// do sends the command until it has its answer, and perhaps once more after that.
func (c *clients) do(ctx context.Context, cmd *command) {
	cmd.pending.Add(1)
	c.send(cmd)
	if rand.IntN(repeatOne) > 0 {
		c.release(cmd)
		return
	}
	later := rand.N(200 * time.Millisecond)
	if rand.IntN(20) == 0 {
		later = rand.N(10 * time.Second)
	}
	c.all.Go(func() {
		select {
		case <-time.After(later):
		case <-ctx.Done():
		}
		c.send(cmd)
		c.repeats.Add(1)
		c.release(cmd)
	})
}

// release gives the command's slot back with the last that may send it.
func (c *clients) release(cmd *command) {
	if cmd.pending.Add(-1) == 0 {
		cmd.on.give(cmd.slot)
	}
}

// send sends the command to one replica after the other until one gives a final answer. A request that is not answered
// is never given up: it may be in a process that is paused, and be done when that goes on. So it is waited for, and its
// answer looked at, while others are asked.
func (c *clients) send(cmd *command) {
	asked := map[*replica]bool{}
	type result struct {
		from *replica
		answer
	}
	results := make(chan result, len(c.inventory.all))
	for pause := 10 * time.Millisecond; ; {
		if r := c.inventory.pick(asked); r != nil {
			asked[r] = true
			cmd.pending.Add(1)
			c.all.Go(func() {
				defer c.release(cmd)
				a := c.try(r, cmd)
				c.judge(cmd, a)
				results <- result{r, a}
			})
		}
		var slow <-chan time.Time
		if len(asked) < len(c.inventory.all) {
			slow = time.After(hedge)
		}
		select {
		case <-slow:
			for r := range asked {
				r.avoid()
			}
			c.retries.Add(1)
			continue
		case r := <-results:
			delete(asked, r.from)
			if !r.passing() {
				if len(asked) > 0 {
					c.late.Add(int64(len(asked)))
				}
				return
			}
			if r.status == 0 {
				r.from.avoid()
			}
		}
		c.retries.Add(1)
		time.Sleep(pause/2 + rand.N(pause/2))
		pause = min(2*pause, time.Second)
	}
}

// try sends the command once. Status 0 is no answer.
func (c *clients) try(r *replica, cmd *command) answer {
	req, err := http.NewRequest(http.MethodPost, r.url+cmd.path, strings.NewReader(cmd.body))
	if err != nil {
		return answer{}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", cmd.key)
	resp, err := c.http.Do(req)
	if err != nil {
		return answer{}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}
	}
	return answer{resp.StatusCode, string(bytes.TrimSpace(body)), resp.Header.Get("ETag"), resp.Header.Get("Consistency-Token")}
}

// judge takes an answer down. The first final one counts, and every later one has to be the same.
func (c *clients) judge(cmd *command, a answer) {
	if a.passing() {
		return
	}
	cmd.mu.Lock()
	defer cmd.mu.Unlock()
	switch {
	case !a.done():
		c.wrong.Add(1)
		c.find("%s %s with key %s was answered %+v", cmd.path, cmd.body, cmd.key, a)
	case cmd.final.status != 0:
		if a != cmd.final {
			c.differing.Add(1)
			c.find("%s %s with key %s was answered %+v, and then %+v", cmd.path, cmd.body, cmd.key, cmd.final, a)
		}
	case a.status == http.StatusOK:
		cmd.final = a
		c.accepted.Add(1)
		c.account(cmd)
	default:
		cmd.final = a
		c.refused.Add(1)
		if cmd.receive || cmd.units > 0 || !strings.Contains(a.body, `problem:not-enough-stock"`) {
			c.wrong.Add(1)
			c.find("%s %s with key %s was refused: %+v", cmd.path, cmd.body, cmd.key, a)
		}
	}
}

// account notes an accepted command under the version that it was told.
func (c *clients) account(cmd *command) {
	var told struct {
		ID      string
		Version int64
	}
	s := cmd.on
	err := json.Unmarshal([]byte(cmd.final.body), &told)
	if err != nil || told.ID != s.name || told.Version < 1 || cmd.units == -tooMuch {
		c.wrong.Add(1)
		c.find("%s %s with key %s was answered %+v", cmd.path, cmd.body, cmd.key, cmd.final)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created = true
	if cmd.receive {
		s.received += cmd.units
	} else {
		s.adjusted += cmd.units
	}
	for int64(len(s.acked)) < told.Version {
		s.acked = append(s.acked, nil)
	}
	if other := s.acked[told.Version-1]; other != nil {
		s.twice++
		c.find("%s: the commands with keys %s and %s were both told version %d", s.name, other.key, cmd.key, told.Version)
		return
	}
	s.acked[told.Version-1] = cmd
}

// balance is what came of the acknowledged commands.
type balance struct {
	lost    int64 // acknowledged, and not found
	doubled int64 // found, and acknowledged to nobody: every command has been, so it was done more than once
	unequal int64 // SKUs whose units are not those that were acknowledged
}

func (b balance) ok() bool { return b == balance{} }

// compare takes the acknowledged commands to the stock that the shop tells when it is at rest.
func (c *clients) compare(ctx context.Context, client *shop.Client) (b balance, err error) {
	told := map[string]shop.Stock{}
	for s, err := range client.Stocks(ctx) {
		if err != nil {
			return b, err
		}
		told[s.SKU] = s
	}
	for _, s := range c.skus {
		is := told[s.name]
		lost, doubled := int64(s.twice), max(0, is.Version-int64(len(s.acked)))
		for i, cmd := range s.acked {
			switch {
			case cmd == nil && int64(i) < is.Version:
				doubled++
			case cmd != nil && int64(i) >= is.Version:
				lost++
			}
		}
		unequal := is.Received != s.received || is.Adjusted != s.adjusted || is.Available != s.received+s.adjusted
		if lost > 0 || doubled > 0 || unequal {
			c.find("%s: %d lost, %d doubled; acknowledged are %d versions, %d received, %d adjusted; the shop has %+v",
				s.name, lost, doubled, len(s.acked), s.received, s.adjusted, is)
		}
		b.lost, b.doubled = b.lost+lost, b.doubled+doubled
		if unequal {
			b.unequal++
		}
	}
	return b, nil
}

// compareLog takes the acknowledged commands to the public events of inventory: under the version that a command was
// told, its event has to be there, once, and none that nobody was told of.
func (c *clients) compareLog(ctx context.Context, brokers []string, partitions int) (b balance, err error) {
	client, err := kafka.Connect(ctx, kafka.Config{Brokers: brokers, ClientID: "wharf-torture"})
	if err != nil {
		return b, err
	}
	defer client.Close()
	const topic = "inventory.events"
	reader := client.Reader(topic)
	byName := map[string]*sku{}
	for _, s := range c.skus {
		byName[s.name] = s
	}
	found := map[*sku]int64{}
	for p := range int32(partitions) {
		end, err := reader.End(ctx, p)
		if err != nil {
			return b, err
		}
		if end == 0 {
			continue
		}
		reading, enough := context.WithCancel(ctx)
		last := int64(0)
		err = reader.Read(reading, p, 0, func(batch journal.Batch) error {
			for _, r := range batch.Records {
				e, ok := journal.ParseEvent(topic, r)
				if !ok || e.Seq <= last { // a publisher may repeat, which every reader skips
					continue
				}
				if e.Seq != last+1 {
					c.find("%s/%d: event %d follows event %d", topic, p, e.Seq, last)
					b.lost += e.Seq - last - 1
				}
				last = e.Seq
				s := byName[e.Stream]
				if s == nil {
					continue
				}
				var data struct{ Quantity, Delta int64 }
				if err := json.Unmarshal(e.Data, &data); err != nil {
					return err
				}
				if found[s]+1 != e.Version || e.Version > int64(len(s.acked)) || s.acked[e.Version-1] == nil {
					b.doubled++
					c.find("%s: nobody was told of event %s, version %d: %s", s.name, e.Name, e.Version, e.Data)
				} else if cmd := s.acked[e.Version-1]; cmd.units != cmp.Or(data.Quantity, data.Delta) ||
					cmd.receive != (e.Name == inventory.Received{}.EventName()) {
					b.unequal++
					c.find("%s: version %d is %s %s; the command %s %s was told it", s.name, e.Version, e.Name, e.Data,
						cmd.path, cmd.body)
				}
				found[s]++
			}
			if batch.Next >= end {
				enough()
			}
			return nil
		})
		enough()
		if ctx.Err() != nil || !errors.Is(err, context.Canceled) {
			return b, fmt.Errorf("read %s/%d: %w", topic, p, err)
		}
	}
	for _, s := range c.skus {
		for i := found[s]; i < int64(len(s.acked)); i++ {
			b.lost++
			c.find("%s: the event of version %d is not there", s.name, i+1)
		}
	}
	return b, nil
}
