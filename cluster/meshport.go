package cluster

import (
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// What Services say of a port: appProtocol (KEP-2458 and
// https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol), or the name's first word as
// Istio has it (https://istio.io/latest/docs/ops/configuration/traffic-management/protocol-selection/).
var portProtocols = map[string]string{
	"http": intercept.HTTPKnown, "http2": intercept.HTTPKnown, "grpc": intercept.HTTPKnown, "grpc-web": intercept.HTTPKnown,
	"kubernetes.io/h2c": intercept.HTTPKnown, "kubernetes.io/ws": intercept.HTTPKnown, "ws": intercept.HTTPKnown, "h2c": intercept.HTTPKnown,

	"https": intercept.HTTPNever, "tls": intercept.HTTPNever, "kubernetes.io/wss": intercept.HTTPNever, "wss": intercept.HTTPNever,
	"tcp": intercept.HTTPNever, "udp": intercept.HTTPNever, "mysql": intercept.HTTPNever, "mongo": intercept.HTTPNever, "redis": intercept.HTTPNever,
}

// httpOf is how gates find requests on a port: Route.HTTP.
func httpOf(p PlanPort) string {
	if p.Protocol == corev1.ProtocolUDP {
		return intercept.HTTPNever
	}
	if how, ok := portProtocols[protocolWord(p)]; ok {
		return how
	}
	return intercept.HTTPSniff
}

// protocolWord is what a Service calls a port's protocol, empty for nothing that is
// known.
func protocolWord(p PlanPort) string {
	if p.AppProtocol != nil && *p.AppProtocol != "" {
		return strings.ToLower(*p.AppProtocol)
	}
	if strings.HasPrefix(p.Name, "grpc-web") {
		return "grpc-web"
	}
	word, _, _ := strings.Cut(p.Name, "-")
	if _, ok := portProtocols[word]; ok {
		return word
	}
	return ""
}
