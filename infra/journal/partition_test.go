package journal

import "testing"

// The values are from Kafka's own UtilsTest.testMurmur2; the partitions are what its DefaultPartitioner makes of them.
func TestMurmur2IsKafkas(t *testing.T) {
	for key, want := range map[string]int32{
		"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536,
		"a-little-bit-longer-string": -1486304829, "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
		"abc": 479470107,
	} {
		if got := int32(murmur2([]byte(key))); got != want {
			t.Errorf("murmur2(%q) = %d, want %d", key, got, want)
		}
		if got := Partition([]byte(key), 12); got != (want&0x7fffffff)%12 {
			t.Errorf("%q belongs to partition %d of 12", key, got)
		}
	}
}
