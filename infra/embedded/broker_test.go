package embedded

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/IBM/sarama"
)

func startTestBroker(t *testing.T, dir string) *Broker {
	t.Helper()
	b, err := StartBroker(t.Context(), dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// clientConfig is that of a client which outlives the broker's absence.
func clientConfig() *sarama.Config {
	c := sarama.NewConfig()
	c.Version = sarama.V3_6_0_0
	c.Producer.Idempotent = true
	c.Producer.RequiredAcks = sarama.WaitForAll
	c.Producer.Partitioner = sarama.NewManualPartitioner
	c.Producer.Return.Successes = true
	c.Producer.Retry.Max = 1000
	c.Producer.Retry.Backoff = 20 * time.Millisecond
	c.Net.MaxOpenRequests = 1
	c.Metadata.Retry.Max = 1000
	c.Metadata.Retry.Backoff = 20 * time.Millisecond
	c.Metadata.AllowAutoTopicCreation = false
	c.Consumer.Offsets.AutoCommit.Enable = false
	c.Consumer.Offsets.Initial = sarama.OffsetOldest
	return c
}

func newClient(t testing.TB, addr string) sarama.Client {
	t.Helper()
	c, err := sarama.NewClient([]string{addr}, clientConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func createTopic(t testing.TB, c sarama.Client, topic string, partitions int32, settings map[string]string) {
	t.Helper()
	admin, err := sarama.NewClusterAdminFromClient(c)
	if err != nil {
		t.Fatal(err)
	}
	detail := &sarama.TopicDetail{NumPartitions: partitions, ReplicationFactor: 1, ConfigEntries: map[string]*string{}}
	for k, v := range settings {
		detail.ConfigEntries[k] = &v
	}
	if err := admin.CreateTopic(topic, detail, false); err != nil {
		t.Fatal(err)
	}
}

// readAll reads the values of the partition up to its end.
func readAll(t *testing.T, c sarama.Client, topic string, partition int32) (values []string) {
	t.Helper()
	end, err := c.GetOffset(topic, partition, sarama.OffsetNewest)
	if err != nil {
		t.Fatal(err)
	}
	if end == 0 {
		return nil
	}
	consumer, err := sarama.NewConsumerFromClient(c)
	if err != nil {
		t.Fatal(err)
	}
	pc, err := consumer.ConsumePartition(topic, partition, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	for {
		select {
		case m := <-pc.Messages():
			if m.Offset != int64(len(values)) {
				t.Fatalf("offset %d follows %d records", m.Offset, len(values))
			}
			values = append(values, string(m.Value))
			if m.Offset == end-1 {
				return values
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%d of %d records, then silence", len(values), end)
		}
	}
}

// TestBrokerSurvivesKills kills the broker again and again while a producer in another process goes on: everything
// acknowledged is in the log, once and in order.
func TestBrokerSurvivesKills(t *testing.T) {
	t.Parallel()
	const topic, partitions, kills, acksBetween = "t.journal", 4, 3, 400
	dir := t.TempDir()
	broker, addr := startChild(t, "broker", dir)
	client := newClient(t, addr)
	createTopic(t, client, topic, partitions, keptSettings)
	commitProgress(t, client, topic)

	producer, err := sarama.NewSyncProducerFromClient(client)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	var (
		acks    = make(chan int32) // partitions
		stop    = make(chan struct{})
		writers sync.WaitGroup
	)
	for p := range int32(partitions) {
		writers.Go(func() {
			for n := 0; ; n++ {
				value := sarama.StringEncoder(strconv.Itoa(n))
				_, _, err := producer.SendMessage(&sarama.ProducerMessage{Topic: topic, Partition: p, Value: value})
				if err != nil {
					t.Errorf("partition %d, record %d: %v", p, n, err)
					return
				}
				acks <- p
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	go func() {
		writers.Wait()
		close(acks)
	}()
	var acked [partitions]int
	for range kills {
		for range acksBetween {
			if p, ok := <-acks; ok {
				acked[p]++
			}
		}
		_ = broker.Process.Kill() // the writers go on
		_ = broker.Wait()
		var again string
		if broker, again = startChild(t, "broker", dir); again != addr {
			t.Fatalf("the broker was at %s, now it is at %s", addr, again)
		}
	}
	close(stop)
	for p := range acks {
		acked[p]++
	}

	for p := range int32(partitions) {
		values := readAll(t, client, topic, p)
		if len(values) != acked[p] {
			t.Errorf("partition %d: %d records were acknowledged, %d are there", p, acked[p], len(values))
		}
		for i, v := range values {
			if v != strconv.Itoa(i) {
				t.Fatalf("partition %d: record %s is in the place of %d", p, v, i)
			}
		}
	}
	checkProgress(t, client, topic)
}

var keptSettings = map[string]string{"retention.ms": "-1", "unclean.leader.election.enable": "false"}

func commitProgress(t *testing.T, client sarama.Client, topic string) {
	t.Helper()
	coordinator, err := client.Coordinator("policies")
	if err != nil {
		t.Fatal(err)
	}
	request := &sarama.OffsetCommitRequest{Version: 6, ConsumerGroup: "policies", ConsumerGroupGeneration: -1}
	request.AddBlockWithLeaderEpoch(topic, 1, 7, -1, 0, "progress 7")
	response, err := coordinator.CommitOffset(request)
	if err != nil || response.Errors[topic][1] != sarama.ErrNoError {
		t.Fatalf("commit: %v, %+v", err, response)
	}
}

func checkProgress(t *testing.T, client sarama.Client, topic string) {
	t.Helper()
	admin, err := sarama.NewClusterAdminFromClient(client)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := admin.ListConsumerGroupOffsets("policies", map[string][]int32{topic: {1}})
	if err != nil {
		t.Fatal(err)
	}
	if block := committed.GetBlock(topic, 1); block == nil || block.Offset != 7 || block.Metadata != "progress 7" {
		t.Errorf("the committed offset is %+v", block)
	}
	described, err := admin.DescribeConfigs([]*sarama.ConfigResource{{Type: sarama.TopicResource, Name: topic}},
		sarama.DescribeConfigsOptions{})
	if err != nil || len(described) != 1 {
		t.Fatal(described, err)
	}
	settings := described[0].Configs
	for name, want := range keptSettings {
		if !slices.ContainsFunc(settings, func(e sarama.ConfigEntry) bool { return e.Name == name && e.Value == want }) {
			t.Errorf("%s is not %s: %+v", name, want, settings)
		}
	}
}

// A producer whose acknowledgement was lost with the broker sends the batch again.
func TestBrokerKnowsARepeatedBatchAfterAKill(t *testing.T) {
	t.Parallel()
	const topic = "t.events"
	dir := t.TempDir()
	broker, addr := startChild(t, "broker", dir)
	client := newClient(t, addr)
	createTopic(t, client, topic, 1, nil)
	var id *sarama.InitProducerIDResponse
	send := func(sequence, records int32) (offset int64) {
		t.Helper()
		b := sarama.NewBroker(addr)
		if err := b.Open(clientConfig()); err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if id == nil {
			var err error
			ask := &sarama.InitProducerIDRequest{Version: 4, ProducerID: -1, ProducerEpoch: -1}
			if id, err = b.InitProducerID(ask); err != nil {
				t.Fatal(err)
			}
		}
		batch := &sarama.RecordBatch{
			Version: 2, ProducerID: id.ProducerID, ProducerEpoch: id.ProducerEpoch, FirstSequence: sequence,
			LastOffsetDelta: records - 1, FirstTimestamp: time.Now(), MaxTimestamp: time.Now(),
		}
		for i := range records {
			batch.Records = append(batch.Records, &sarama.Record{
				OffsetDelta: int64(i), Value: fmt.Appendf(nil, "%d", sequence+i),
			})
		}
		request := &sarama.ProduceRequest{Version: 7, RequiredAcks: sarama.WaitForAll, Timeout: 10_000}
		request.AddBatch(topic, 0, batch)
		response, err := b.Produce(request)
		if err != nil {
			t.Fatal(err)
		}
		block := response.GetBlock(topic, 0)
		if block.Err != sarama.ErrNoError {
			t.Fatal(block.Err)
		}
		return block.Offset
	}
	for sequence := int32(0); sequence < 70; sequence += 10 { // more than the broker has to remember
		send(sequence, 10)
	}
	_ = broker.Process.Kill()
	_ = broker.Wait()
	tear(t, filepath.Join(dir, logDir, "partitions", topic+"-0", "0.dat"))
	_, addr = startChild(t, "broker", dir)

	if offset := send(50, 10); offset != 50 {
		t.Errorf("the batch of offset 50, sent again, has offset %d", offset)
	}
	if offset := send(70, 10); offset != 70 {
		t.Errorf("the next batch has offset %d, want 70", offset)
	}
	if values := readAll(t, newClient(t, addr), topic, 0); len(values) != 80 || values[79] != "79" {
		t.Errorf("%d records: %v", len(values), values)
	}
}

// tear leaves half a batch at the end of the segment.
func tear(t *testing.T, segment string) {
	t.Helper()
	f, err := os.OpenFile(segment, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	half := make([]byte, 100)
	if _, err := io.ReadFull(f, half); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(half); err != nil {
		t.Fatal(err)
	}
}

func TestBrokerKeepsItsLogAndForgetsGroupMembers(t *testing.T) {
	t.Parallel()
	const topic = "t.events"
	dir := t.TempDir()
	b := startTestBroker(t, dir)
	client := newClient(t, b.Addrs()[0])
	createTopic(t, client, topic, 2, nil)
	producer, err := sarama.NewSyncProducerFromClient(client)
	if err != nil {
		t.Fatal(err)
	}
	defer producer.Close()
	message := &sarama.ProducerMessage{Topic: topic, Value: sarama.StringEncoder("x")}
	if _, _, err := producer.SendMessage(message); err != nil {
		t.Fatal(err)
	}
	join(t, client, topic) // and never leave
	_ = client.Close()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}

	b = startTestBroker(t, dir)
	client = newClient(t, b.Addrs()[0])
	if values := readAll(t, client, topic, 0); !slices.Equal(values, []string{"x"}) {
		t.Errorf("the log holds %v", values)
	}
	join(t, client, topic)
	admin, err := sarama.NewClusterAdminFromClient(client)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := admin.DescribeConsumerGroups([]string{"g"})
	if err != nil || len(groups) != 1 || len(groups[0].Members) != 1 {
		t.Errorf("the group is %+v (%v)", groups, err)
	}
}

// join makes a member of the group "g" by hand, one that does not leave.
func join(t *testing.T, client sarama.Client, topic string) {
	t.Helper()
	coordinator, err := client.Coordinator("g")
	if err != nil {
		t.Fatal(err)
	}
	request := &sarama.JoinGroupRequest{
		Version: 5, GroupId: "g", SessionTimeout: 30_000, RebalanceTimeout: 30_000, ProtocolType: "consumer",
	}
	meta := &sarama.ConsumerGroupMemberMetadata{Topics: []string{topic}}
	if err := request.AddGroupProtocolMetadata("range", meta); err != nil {
		t.Fatal(err)
	}
	response, err := coordinator.JoinGroup(request)
	if err == nil && response.Err == sarama.ErrMemberIdRequired {
		request.MemberId = response.MemberId
		response, err = coordinator.JoinGroup(request)
	}
	if err != nil || response.Err != sarama.ErrNoError {
		t.Fatalf("join: %v, %+v", err, response)
	}
}

func TestBrokerTurnsAwayWhoDoesNotSpeakKafka(t *testing.T) {
	t.Parallel()
	b := startTestBroker(t, t.TempDir())
	if resp, err := http.Get("http://" + b.Addrs()[0]); err == nil {
		resp.Body.Close()
		t.Error("it speaks HTTP")
	}
	c, err := net.Dial("tcp", b.Addrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte{0, 0, 0, 20, 0x7f, 0xff, 0, 0}); err != nil { // a request that does not exist
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("it answers %d bytes", n)
	}
	newClient(t, b.Addrs()[0]) // and it still serves others
}

// BenchmarkBroker measures how long one record takes to be acknowledged, and to reach a consumer that waits for it.
func BenchmarkBroker(b *testing.B) {
	broker, err := StartBroker(b.Context(), b.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer broker.Close()
	writing := newClient(b, broker.Addrs()[0])
	reading := newClient(b, broker.Addrs()[0]) // a connection has one request in flight, and a fetch may wait long
	createTopic(b, writing, "t.events", 12, nil)
	producer, err := sarama.NewSyncProducerFromClient(writing)
	if err != nil {
		b.Fatal(err)
	}
	defer producer.Close()
	value := sarama.ByteEncoder(make([]byte, 500))
	send := func(p int32) {
		message := &sarama.ProducerMessage{Topic: "t.events", Partition: p, Value: value}
		if _, _, err := producer.SendMessage(message); err != nil {
			b.Error(err)
		}
	}
	b.Run("acknowledged", func(b *testing.B) {
		for b.Loop() {
			send(0)
		}
	})
	b.Run("acknowledged/64 writers", func(b *testing.B) {
		b.SetParallelism(max(1, 64/runtime.GOMAXPROCS(0)))
		var next atomic.Int32
		b.RunParallel(func(pb *testing.PB) {
			for p := next.Add(1) % 12; pb.Next(); {
				send(p)
			}
		})
	})
	b.Run("consumed", func(b *testing.B) {
		consumer, err := sarama.NewConsumerFromClient(reading)
		if err != nil {
			b.Fatal(err)
		}
		pc, err := consumer.ConsumePartition("t.events", 0, sarama.OffsetNewest)
		if err != nil {
			b.Fatal(err)
		}
		defer pc.Close()
		for b.Loop() {
			send(0)
			<-pc.Messages()
		}
	})
}
