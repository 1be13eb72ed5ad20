package cluster

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestParseExpose(t *testing.T) {
	got, err := ParseExpose([]string{"8080:80, 9090", "5353:dns/udp", "443/TCP,8443:0443", "53:53/tcp,53:53/udp", ""})
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		got[i].text = ""
	}
	want := []Expose{
		{Local: 8080, Remote: "80"}, {Local: 9090, Remote: "9090"}, {Local: 5353, Remote: "dns", Protocol: corev1.ProtocolUDP},
		{Local: 443, Remote: "443", Protocol: corev1.ProtocolTCP}, {Local: 8443, Remote: "443"},
		{Local: 53, Remote: "53", Protocol: corev1.ProtocolTCP}, {Local: 53, Remote: "53", Protocol: corev1.ProtocolUDP},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestParseExposeRefuses(t *testing.T) {
	for _, test := range []struct{ entry, says string }{
		{"0", "between 1 and 65535"}, {"65536", "between 1 and 65535"}, {"8080:0", "between 1 and 65535"}, {"8080:70000", "between 1 and 65535"},
		{"99999999999", "no port number"}, {"http", "no port number"}, {":80", "no port number"}, {"8080:", "colon"}, {"-1", "no port number"},
		{"+80", "no port number"}, {"80-90", "no port number"}, {"8080:80:90", "neither a port number"}, {"8080:Http", "neither a port number"},
		{"8080:a b", "neither a port number"}, {"8080/sctp", "neither tcp nor udp"}, {"8080/", "neither tcp nor udp"}, {"8080/tcp/udp", "neither tcp nor udp"},
	} {
		_, err := ParseExpose([]string{"1:1", test.entry})
		wantError(t, err, api.CodeUsage, test.entry, test.says, "--expose 8080:80")
	}
	for _, twice := range [][]string{{"8080:80,8080:80"}, {"80", "80:80"}, {"8080:80", "8080:080"}} {
		_, err := ParseExpose(twice)
		wantError(t, err, api.CodeUsage, "twice")
	}
	for _, none := range [][]string{nil, {""}, {" , "}} {
		_, err := ParseExpose(none)
		wantError(t, err, api.CodeUsage, "missing")
	}
}

// wantError is for an *api.Error of that code which says all of parts.
func wantError(t *testing.T, err error, code string, parts ...string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("error %v, want code %q", err, code)
		return
	}
	for _, part := range parts {
		if !strings.Contains(e.Error(), part) {
			t.Errorf("error %q does not say %q", e.Error(), part)
		}
	}
}
