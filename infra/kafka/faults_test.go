package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

// Three replicas serve eight clients while something goes wrong with Kafka all the time, and then everything that the
// clients were told must be true, of one history and of the public log. What goes wrong is each test's own: here a
// network that loses, delays and falsifies answers, in apache_test.go real brokers that die.

const (
	faultReplicas   = 3
	faultClients    = 8
	faultPartitions = journaltest.Partitions
	coldStreams     = 30
)

// ordeal is a test's journal under faults.
type ordeal struct {
	t               *testing.T
	brokers         []string
	private, public string
	history         journaltest.History

	ctx context.Context

	mu       sync.Mutex
	answered *sync.Cond             // or something else was counted
	open     map[string]map[int]int // per stream: a wish under way with a key, and how many such had begun before
	begun    map[string]int         // per stream: wishes with a key
	version  map[string]int64       // that somebody was told
	tally    map[string]int
}

// underFaults has the clients ask at least n things each, and on while faults runs, which breaks things and leaves
// everything in order behind it. pace is how long a client thinks between two wishes.
func underFaults(t *testing.T, brokers []string, replication int16, n int, pace time.Duration, faults func(*ordeal)) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	admin := connect(t, brokers)
	o := &ordeal{
		t: t, ctx: ctx, brokers: brokers, private: topicOf(t, admin, faultPartitions, replication),
		public: topicOf(t, admin, faultPartitions, replication),
		open:   map[string]map[int]int{}, begun: map[string]int{}, version: map[string]int64{}, tally: map[string]int{},
	}
	o.answered = sync.NewCond(&o.mu)
	context.AfterFunc(ctx, o.answered.Broadcast)
	replicas := make([]*journal.Journal[journaltest.Counter], faultReplicas)
	stops := make([]func(), faultReplicas)
	for i := range replicas {
		replicas[i], stops[i] = o.replica()
	}
	over := make(chan struct{})
	var clients, breaking sync.WaitGroup
	breaking.Go(func() {
		defer close(over)
		faults(o)
	})
	for c := range faultClients {
		clients.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-over:
					if i >= n {
						return
					}
				case <-ctx.Done():
					return
				default:
				}
				o.wish(replicas, c, i)
				time.Sleep(rand.N(2*pace + 1))
			}
		})
	}
	clients.Wait()
	breaking.Wait()
	for _, stop := range stops {
		stop()
	}
	if ctx.Err() != nil {
		t.Fatal("the clients were not answered in time")
	}
	published := o.rest()
	began := time.Now()
	if err := o.history.Check(published); err != nil {
		t.Error(err)
	}
	t.Logf("%d events, judged in %v, of %v", len(published), time.Since(began).Round(time.Millisecond), o.tally)
	for _, happened := range []string{"attempts", "answered", "outcome unknown"} {
		if o.tally[happened] == 0 {
			t.Errorf("no %s: the test tests nothing", happened)
		}
	}
}

// goesOn waits until some more commands have been answered.
func (o *ordeal) goesOn() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for enough := o.tally["answered"] + 30; o.tally["answered"] < enough && o.ctx.Err() == nil; {
		o.answered.Wait()
	}
}

// replica starts a replica with connections of its own.
func (o *ordeal) replica() (j *journal.Journal[journaltest.Counter], stop func()) {
	c := connectWith(o.t, Config{Brokers: o.brokers, readTimeout: 2 * time.Second})
	s := journaltest.Service{T: o.t, Log: c.Log(o.private), Public: c.PublicLog(o.public)}
	cfg := s.Config()
	cfg.Logger = c.log
	j, end := s.Start(cfg)
	return j, func() {
		end()
		if err := c.Close(); err != nil {
			o.t.Error(err)
		}
	}
}

func (o *ordeal) count(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tally[what]++
	o.answered.Broadcast()
}

// wish asks for one thing, at one replica after the other until there is a definite answer; without a key or a cause
// it gives up when the outcome is unknown.
func (o *ordeal) wish(replicas []*journal.Journal[journaltest.Counter], client, number int) {
	a := o.ask(client, number)
	defer o.done(a, client)
	for try := client; o.ctx.Err() == nil; try++ {
		patience := 2 * time.Second
		if rand.IntN(10) == 0 {
			patience = rand.N(50 * time.Millisecond)
		}
		trying, cancel := context.WithTimeout(o.ctx, patience)
		attempt := o.history.Call(client, a)
		r, err := replicas[try%len(replicas)].Handle(trying, a.Command(), a.Decide)
		cancel()
		attempt.Return(r, err)
		o.count("attempts")
		switch {
		case errors.Is(err, commands.ErrUnknownOutcome):
			o.count("outcome unknown")
			if a.Key == "" && a.Group == "" {
				return
			}
		case errors.Is(err, commands.ErrNotReady):
			o.count("not ready")
		case errors.Is(err, commands.ErrConflict):
			o.count("conflicts")
		default:
			o.count("answered")
			if err == nil {
				o.mu.Lock()
				o.version[a.Stream] = max(o.version[a.Stream], r.Version)
				o.mu.Unlock()
			}
			return
		}
	}
}

// ask is something to ask for.
func (o *ordeal) ask(client, number int) journaltest.Ask {
	o.mu.Lock()
	defer o.mu.Unlock()
	a := journaltest.Ask{
		Op: fmt.Sprintf("%d.%d", client, number), Stream: "hot", By: 1 + rand.IntN(3), Limit: 1 << 30,
		IfMatch: commands.AnyVersion,
	}
	if rand.IntN(3) > 0 {
		a.Stream = fmt.Sprint("cold", rand.IntN(coldStreams))
	}
	switch rand.IntN(12) {
	case 0, 1:
		a.What = journaltest.Look
	case 2:
		a.What, a.By = journaltest.Raise, rand.IntN(300)
	case 3:
		a.Limit = rand.IntN(300)
	case 4:
		a.IfMatch = o.version[a.Stream]
	case 5:
		a.Parts = 1 + rand.IntN(5)
	case 6: // a stream that ends soon
		a.Stream = fmt.Sprint("brief", number/10)
		if rand.IntN(3) == 0 {
			a.What = journaltest.Finish
		}
	case 7: // a policy hands the events of its source to a stream in order, and so does this client
		a.What, a.Group = journaltest.Must, "policies"
		a.Cause = domain.Position{Topic: "others.events", Partition: int32(client), Seq: int64(number + 1)}
	}
	if a.Group == "" && rand.IntN(2) == 0 && o.begin(a.Stream, client) {
		a.Key = a.Op
	}
	return a
}

// begin is false while a stream might forget a key before its wish has its answer.
func (o *ordeal) begin(stream string, client int) bool {
	for _, before := range o.open[stream] {
		if o.begun[stream]-before >= journal.KeysPerStream-faultClients {
			return false
		}
	}
	if o.open[stream] == nil {
		o.open[stream] = map[int]int{}
	}
	o.open[stream][client] = o.begun[stream]
	o.begun[stream]++
	return true
}

func (o *ordeal) done(a journaltest.Ask, client int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if a.Key != "" {
		delete(o.open[a.Stream], client)
	}
}

// rest is the public log at rest. One more command to every stream decides whatever was still under way to it.
func (o *ordeal) rest() []domain.Recorded {
	j, stop := o.replica()
	defer stop()
	streams := map[string]bool{"hot": true}
	for i := range coldStreams {
		streams[fmt.Sprint("cold", i)] = true
	}
	for stream := range o.version {
		streams[stream] = true
	}
	lasts := make([]int64, faultPartitions)
	for i, stream := range slices.Sorted(maps.Keys(streams)) {
		a := journaltest.Ask{
			Op: fmt.Sprint("last.", i), Stream: stream, By: 1, Limit: 1 << 30, IfMatch: commands.AnyVersion, Key: "last",
		}
		attempt := o.history.Call(faultClients, a)
		r, err := j.Handle(o.ctx, a.Command(), a.Decide)
		attempt.Return(r, err)
		if err != nil && !errors.Is(err, journaltest.ErrFull) { // of one that has ended
			o.t.Fatal(err)
		}
		p := journal.Partition([]byte(stream), faultPartitions)
		lasts[p] = max(lasts[p], r.Position.Seq)
	}
	c := connect(o.t, o.brokers)
	partitions := make([][]journal.Record, faultPartitions)
	for p, last := range lasts {
		err := c.PublicLog(o.public).Read(o.ctx, int32(p), 0, func(b journal.Batch) error {
			for _, r := range b.Records {
				partitions[p] = append(partitions[p], r)
				if e, ok := journal.ParseEvent("counters.events", r); ok && e.Seq == last {
					return errEnough
				}
			}
			return nil
		})
		if !errors.Is(err, errEnough) {
			o.t.Fatalf("partition %d is not published up to its event %d: %v", p, last, err)
		}
		o.tally["public records"] += len(partitions[p])
	}
	published, err := journaltest.Consume(partitions...)
	if err != nil {
		o.t.Fatal(err)
	}
	return published
}

func TestAnswersAreTrueUnderFaults(t *testing.T) {
	if onApache {
		t.Skip("runs with the other tests, on a broker in this process")
	}
	network := &faultyNetwork{seen: map[string]int{}}
	cluster, err := kfake.NewCluster(kfake.NumBrokers(3), kfake.ListenFn(network.listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	n := 400
	if testing.Short() {
		n = 50
	}
	underFaults(t, cluster.ListenAddrs(), 3, n, 0, func(o *ordeal) {
		defer network.fail(calm)
		for i := range 40 {
			network.fail(rough)
			if i < 10 { // early: Sarama gives a broker up for 10 s then
				network.fail(storm)
			}
			topic := o.private
			if i%2 == 0 {
				topic = o.public
			}
			if err := cluster.MoveTopicPartition(topic, int32(i%faultPartitions), int32(rand.IntN(3))); err != nil {
				t.Error(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	t.Logf("faults: %v", network.seen)
	for _, kind := range []string{"request lost", "answer lost", "answer falsified", "answer delayed"} {
		if network.seen[kind] == 0 {
			t.Errorf("no %s: the test tests nothing", kind)
		}
	}
}

// faultyNetwork lies before brokers. In rough weather it loses some requests, each with its connection; it loses some
// answers, delays some, and makes of some that speak of success an error: after the records were written. In a storm
// hardly anything comes through, until clients give up.
type faultyNetwork struct {
	mu      sync.Mutex
	weather weather
	seen    map[string]int
}

type weather int

const (
	calm weather = iota
	rough
	storm
)

func (f *faultyNetwork) fail(w weather) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.weather = w
}

// happens is true for one in that many, in rough weather.
func (f *faultyNetwork) happens(what string, oneIn int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.weather == storm {
		oneIn = 2
	}
	if f.weather == calm || rand.IntN(oneIn) > 0 {
		return false
	}
	f.seen[what]++
	return true
}

func (f *faultyNetwork) listen(network, addr string) (net.Listener, error) {
	l, err := net.Listen(network, addr)
	return faultyListener{l, f}, err
}

type faultyListener struct {
	net.Listener
	network *faultyNetwork
}

func (l faultyListener) Accept() (net.Conn, error) {
	client, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	broker, near := net.Pipe()
	go l.network.connect(client, near)
	return broker, nil
}

var errLost = errors.New("lost")

// connect passes requests and answers on until one is lost or a side closes.
func (f *faultyNetwork) connect(client, broker net.Conn) {
	defer broker.Close()
	defer client.Close()
	var asked sync.Map // what a request is, by its correlation id
	go func() {
		defer broker.Close()
		defer client.Close()
		_ = eachFrame(client, broker, func(request []byte) ([]byte, error) {
			if f.happens("request lost", 300) {
				return nil, errLost
			}
			asked.Store([4]byte(request[8:12]), [2]int16{
				int16(binary.BigEndian.Uint16(request[4:])), int16(binary.BigEndian.Uint16(request[6:])),
			})
			return request, nil
		})
	}()
	_ = eachFrame(broker, client, func(answer []byte) ([]byte, error) {
		if f.happens("answer lost", 200) {
			return nil, errLost
		}
		if f.happens("answer delayed", 50) {
			time.Sleep(rand.N(100 * time.Millisecond))
		}
		what, _ := asked.LoadAndDelete([4]byte(answer[4:8]))
		if is := what.([2]int16); is[0] == int16(kmsg.Produce) && f.happens("answer falsified", 30) {
			return falsified(answer, is[1], []sarama.KError{sarama.ErrRequestTimedOut, sarama.ErrNotEnoughReplicasAfterAppend}[rand.IntN(2)])
		}
		return answer, nil
	})
}

// eachFrame copies what is a length and that many bytes, each as f makes it.
func eachFrame(from io.Reader, to io.Writer, f func([]byte) ([]byte, error)) error {
	for {
		frame := make([]byte, 4)
		if _, err := io.ReadFull(from, frame); err != nil {
			return err
		}
		frame = append(frame, make([]byte, binary.BigEndian.Uint32(frame))...)
		if _, err := io.ReadFull(from, frame[4:]); err != nil {
			return err
		}
		frame, err := f(frame)
		if err != nil {
			return err
		}
		if _, err := to.Write(frame); err != nil {
			return err
		}
	}
}

// falsified is the answer to a produce request with an error in it.
func falsified(answer []byte, version int16, err sarama.KError) ([]byte, error) {
	resp := kmsg.NewPtrProduceResponse()
	resp.SetVersion(version)
	header := 8
	if resp.IsFlexible() {
		header++
	}
	if err := resp.ReadFrom(answer[header:]); err != nil {
		return nil, err
	}
	for _, topic := range resp.Topics {
		for i := range topic.Partitions {
			topic.Partitions[i].ErrorCode, topic.Partitions[i].BaseOffset = int16(err), -1
		}
	}
	answer = resp.AppendTo(answer[:header:header])
	binary.BigEndian.PutUint32(answer, uint32(len(answer)-4))
	return answer, nil
}
