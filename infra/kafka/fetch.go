package kafka

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/IBM/sarama"

	"wharf/infra/journal"
)

// How partitions are read together.
//
// A broker that leads partitions of the topic is a node. It has two lanes, each a connection with at most one fetch
// request under way. The first lane asks for all partitions that somebody waits for, and lets the broker hold the
// answer back until there is data (a long poll). Readings at the same offset share one place in the request.
//
// A reading gets the next batch while its caller works on this one, up to queueBytes; only one that is further behind
// is left out of requests, so a slow caller holds up nobody. When it (or a new one) wants data while the first lane is
// in a long poll, the second lane fetches for it, with short waits, until the first lane's next turn takes it in.
const (
	fetchBytes    = 1 << 20  // of one partition in one answer
	fetchBytesMax = 64 << 20 // the same, for a record batch that is larger
	answerBytes   = 8 << 20  // of one answer
	queueBytes    = 256 << 10
	longPoll      = 500 // ms
	shortPoll     = 5   // ms
)

// reading is one Read under way. Its fields are guarded by Reader.mu.
type reading struct {
	partition int32
	next      int64 // where the next fetch begins
	maxBytes  int32
	queue     []journal.Batch
	sizes     []int // of the batches in queue
	bytes     int   // their sum

	node   *node // who is asked; nil after a fault
	flying bool  // a request under way covers it
	alone  bool  // its last answer could not be decoded: to find out whose fault it is, it gets a request of its own
	fault  error // why node is nil
	wake   chan struct{}
}

// node is a broker that is read from. Its fields are guarded by Reader.mu.
type node struct {
	addr     string
	ctx      context.Context // ends with the node, and cuts its connections
	end      context.CancelFunc
	changed  *sync.Cond
	readings []*reading // longest unserved first
	asked    [2]map[int32]*ask
	idle     bool // the first lane's last poll brought nothing
}

// ask is one partition's place in a request.
type ask struct {
	from     int64
	readings []*reading
}

// place hands the reading to the leader of its partition.
func (r *Reader) place(ctx context.Context, s *reading, refresh bool) error {
	addr, err := r.c.leader(ctx, r.topic, s.partition, refresh)
	if err != nil {
		return err
	}
	// A fetch names its topic, and would go on in another one of that name. But whoever reads waits for an answer
	// nearly all the time, and gets an error when the topic is deleted; that leads here. (What is made anew between two
	// requests is noticed by the look that fetch takes once a second.)
	if err := r.c.sameTopic(ctx, addr, r.topic); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[addr]
	if n == nil {
		n = &node{addr: addr, changed: sync.NewCond(&r.mu)}
		n.ctx, n.end = context.WithCancel(r.c.ctx)
		for lane := range n.asked {
			if !r.c.enter() {
				n.end() // of a lane that was started
				return ErrClosed
			}
			go r.fetch(n, lane)
		}
		r.nodes[addr] = n
	}
	s.node = n
	n.readings = append(n.readings, s)
	n.changed.Broadcast()
	return nil
}

// leave takes the reading from its node, which ends when nobody reads from it any more.
func (r *Reader) leave(s *reading) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(s)
}

func (r *Reader) drop(s *reading) {
	n := s.node
	if n == nil {
		return
	}
	s.node, s.flying = nil, false
	n.readings = slices.DeleteFunc(n.readings, func(o *reading) bool { return o == s })
	for _, lane := range n.asked {
		if a := lane[s.partition]; a != nil {
			a.readings = slices.DeleteFunc(a.readings, func(o *reading) bool { return o == s })
		}
	}
	if len(n.readings) == 0 {
		delete(r.nodes, n.addr)
		n.end()
		n.changed.Broadcast()
	}
}

// wakeLanes lets the lanes see that the client was closed.
func (r *Reader) wakeLanes() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.nodes {
		n.changed.Broadcast()
	}
}

// pop is the next batch for the reading's caller, or the fault that came after the last one.
func (r *Reader) pop(s *reading) (b journal.Batch, ok bool, fault error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(s.queue) == 0 {
		fault, s.fault = s.fault, nil
		return b, false, fault
	}
	b = s.queue[0]
	s.bytes -= s.sizes[0]
	s.queue, s.sizes = slices.Delete(s.queue, 0, 1), slices.Delete(s.sizes, 0, 1)
	if s.node != nil && !s.flying {
		s.node.changed.Broadcast()
	}
	return b, true, nil
}

// fetch is one lane.
func (r *Reader) fetch(n *node, lane int) {
	defer r.c.wg.Done()
	conf := *r.c.conf
	conf.Net.Proxy.Enable = true
	conf.Net.Proxy.Dialer = cutDialer{n.ctx, conf.Net.DialTimeout}
	conn := sarama.NewBroker(n.addr)
	defer func() { _ = conn.Close() }() // ErrNotConnected, or nothing that could be done about it
	names := names{}
	for {
		req := r.next(n, lane)
		if req == nil {
			return
		}
		_ = conn.Open(&conf) // it is open already, or the request tells what is wrong
		resp, err := conn.Fetch(req)
		if err == nil && resp.ErrorCode != 0 {
			err = sarama.KError(resp.ErrorCode)
		}
		if err == nil && !r.c.lately(r.topic) {
			err = r.c.sameTopic(n.ctx, n.addr, r.topic)
		}
		r.share(n, lane, resp, err, names)
	}
}

// cutDialer makes connections that end with a context: there is no other way to take back a long poll.
type cutDialer struct {
	ctx     context.Context
	timeout time.Duration
}

func (d cutDialer) Dial(network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: d.timeout}).DialContext(d.ctx, network, addr)
	if err == nil {
		context.AfterFunc(d.ctx, func() { _ = conn.Close() })
	}
	return conn, err
}

// next waits until somebody wants data and makes the request for it. It is nil when the lane has to end.
func (r *Reader) next(n *node, lane int) *sarama.FetchRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if n.ctx.Err() != nil {
			return nil
		}
		// The second lane is there for what missed the first one's long poll. When nothing is going on, the first
		// lane lets it finish, so as to take over what it has.
		wait := lane == 0 && n.idle && n.asked[1] != nil || lane == 1 && n.asked[0] == nil
		if !wait {
			if asks := n.wanted(lane); len(asks) > 0 {
				n.asked[lane] = asks
				n.changed.Broadcast()
				return r.request(lane, asks)
			}
		}
		n.changed.Wait()
	}
}

// wanted is who wants data and is in no request yet, one place a partition.
func (n *node) wanted(lane int) map[int32]*ask {
	asks := map[int32]*ask{}
	var served []*reading
	for _, s := range n.readings {
		if s.flying || s.bytes >= queueBytes {
			continue
		}
		if a := n.asked[1-lane][s.partition]; a != nil && a.from == s.next {
			a.readings = append(a.readings, s) // on its way already
			s.flying = true
			continue
		}
		if s.alone && len(asks) > 0 {
			continue
		}
		a := asks[s.partition]
		if a == nil {
			a = &ask{from: s.next}
			asks[s.partition] = a
		}
		if a.from == s.next {
			a.readings = append(a.readings, s)
			s.flying = true
			served = append(served, s)
		}
		if s.alone {
			break
		}
	}
	if len(served) > 0 {
		n.readings = slices.DeleteFunc(n.readings, func(s *reading) bool { return slices.Contains(served, s) })
		n.readings = append(n.readings, served...)
	}
	return asks
}

func (r *Reader) request(lane int, asks map[int32]*ask) *sarama.FetchRequest {
	req := &sarama.FetchRequest{
		Version: 12, MinBytes: 1, MaxBytes: answerBytes, MaxWaitTime: longPoll,
		Isolation:    sarama.ReadUncommitted,
		SessionEpoch: -1, // every request says all that is wanted
	}
	if lane == 1 {
		req.MaxWaitTime = shortPoll
	}
	for p, a := range asks {
		most := int32(fetchBytes)
		for _, s := range a.readings {
			most = max(most, s.maxBytes)
		}
		req.AddBlock(r.topic, p, a.from, most, -1)
	}
	return req
}

// share gives what the request brought to those who wanted it.
func (r *Reader) share(n *node, lane int, resp *sarama.FetchResponse, err error, names names) {
	type part struct {
		batch   journal.Batch
		size    int
		partial bool
		err     error
	}
	r.mu.Lock()
	asks := n.asked[lane] // only this lane adds or removes places; readings may come and go
	r.mu.Unlock()
	parts := make(map[int32]part, len(asks))
	for p, a := range asks {
		pt := part{err: err}
		if err == nil {
			switch block := resp.GetBlock(r.topic, p); {
			case block == nil:
				pt.err = sarama.ErrIncompleteResponse
			case block.Err != sarama.ErrNoError:
				pt.err = block.Err
			default:
				pt.batch, pt.size, pt.partial, pt.err = decode(block, p, a.from, names)
			}
		}
		parts[p] = pt
	}
	var broken sarama.PacketDecodingError
	undecodable := errors.As(err, &broken) || errors.Is(err, sarama.ErrInsufficientData)

	r.mu.Lock()
	defer r.mu.Unlock()
	n.asked[lane] = nil
	brought := false
	for p, a := range asks {
		pt := parts[p]
		for _, s := range slices.Clone(a.readings) {
			s.flying = false
			s.alone = undecodable
			switch {
			case pt.err != nil:
				s.fault = pt.err
				r.drop(s)
			case pt.batch.Next > a.from:
				s.maxBytes = fetchBytes
				s.next = pt.batch.Next
				s.queue, s.sizes, s.bytes = append(s.queue, pt.batch), append(s.sizes, pt.size), s.bytes+pt.size
				brought = true
			case pt.partial:
				s.maxBytes = min(2*s.maxBytes, fetchBytesMax)
				brought = true
				continue // nothing to wake up for
			default:
				continue
			}
			select {
			case s.wake <- struct{}{}:
			default:
			}
		}
	}
	if lane == 0 {
		n.idle = !brought
	}
	n.changed.Broadcast()
}

// decode is what the answer holds of the partition from the offset on. Next goes past control records, which have no
// message. (A batch without any record would not be seen here: only compaction leaves those behind, and CheckTopics
// refuses it.) With partial, not even one batch fitted into the answer.
func decode(block *sarama.FetchResponseBlock, partition int32, from int64, names names) (
	b journal.Batch, size int, partial bool, err error,
) {
	b.Next = from
	records, headers := 0, 0
	for _, set := range block.RecordsSet {
		if set.RecordBatch == nil {
			return b, 0, false, errors.New("the log holds messages in a format from before Kafka 0.11")
		}
		records += len(set.RecordBatch.Records)
		for _, r := range set.RecordBatch.Records {
			headers += len(r.Headers)
		}
	}
	if records > 0 {
		b.Records = make([]journal.Record, 0, records)
	}
	all := make([]journal.Header, 0, headers)
	var last []journal.Header
	for _, set := range block.RecordsSet {
		rb := set.RecordBatch
		if rb.PartialTrailingRecord {
			break
		}
		b.Next = max(b.Next, rb.LastOffset()+1)
		if rb.Control {
			continue
		}
		for _, r := range rb.Records {
			out := journal.Record{
				Partition: partition, Offset: rb.FirstOffset + r.OffsetDelta, Key: r.Key, Value: r.Value,
				Time: rb.FirstTimestamp.Add(r.TimestampDelta),
			}
			if out.Offset < from {
				continue // a batch is fetched whole
			}
			if rb.LogAppendTime {
				out.Time = rb.MaxTimestamp
			}
			first := len(all)
			for i, h := range r.Headers {
				name := ""
				if i < len(last) && last[i].Key == string(h.Key) { // most records have the same headers in the same order
					name = last[i].Key
				} else {
					name = names.get(h.Key)
				}
				all = append(all, journal.Header{Key: name, Value: h.Value})
				size += len(h.Key) + len(h.Value)
			}
			last = all[first:]
			out.Headers = withoutUUID(all[first:len(all):len(all)])
			b.Records = append(b.Records, out)
			size += len(r.Key) + len(r.Value) + 128
		}
	}
	return b, size, b.Next == from && (block.Partial || records == 0 && len(block.RecordsSet) > 0), nil
}

// names keeps one string of every header name, of which there are few.
type names map[string]string

func (ns names) get(b []byte) string {
	if s, ok := ns[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(ns) < 256 {
		ns[s] = s
	}
	return s
}
