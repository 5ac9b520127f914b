/// One row a type: everything that depends on the type is read off this one table.
macro_rules! message_types {
    ($($id:literal $variant:ident $name:literal $keys:ident [$($field:literal)*])*) => {
        /// The type of a message, the second byte of its frame.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum MessageType {
            $(#[doc = concat!("`", $name, "`, id `", stringify!($id), "`.")] $variant = $id,)*
        }

        impl MessageType {
            /// Every type, by ascending id.
            pub const ALL: [Self; [$($id),*].len()] = [$(Self::$variant),*];

            /// The type's name, in lower case with underscores.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The type with this id, if there is one.
            pub const fn from_id(id: u8) -> Option<Self> {
                match id { $($id => Some(Self::$variant),)* _ => None }
            }

            /// The type with this name, if there is one. `dht_store` is another name of `store`.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    "dht_store" => Some(Self::Store),
                    _ => None,
                }
            }

            /// The fields that a message of this type must have to be sent; it may have others.
            pub const fn required(self) -> Required {
                match self {
                    $(Self::$variant => Required {
                        fields: &[$($field),*],
                        binary_keys: message_types!(@ $keys),
                    },)*
                }
            }
        }
    };
    (@ atoms) => { false };
    (@ either) => { true };
}

message_types! {
    0x01 Connect "connect" atoms ["version" "node_id" "realm_id" "capabilities"]
    0x02 Disconnect "disconnect" atoms ["reason" "message"]
    0x03 Ping "ping" atoms ["timestamp"]
    0x04 Pong "pong" atoms ["timestamp" "server_time"]
    0x10 Publish "publish" either ["topic" "payload" "qos" "retain" "message_id"]
    0x11 Subscribe "subscribe" either ["topics" "qos"]
    0x12 Unsubscribe "unsubscribe" either ["topics"]
    0x13 PubsubRoute "pubsub_route" either ["destination_node_id" "source_node_id" "hop_count" "max_hops" "topic" "payload"]
    0x20 Call "call" atoms []
    0x21 Reply "reply" atoms []
    0x22 Cast "cast" atoms []
    0x23 RpcRoute "rpc_route" either ["destination_node_id" "source_node_id" "hop_count" "max_hops" "payload_type" "payload"]
    0x24 RpcRequest "rpc_request" either ["request_id" "procedure" "args" "from_node"]
    0x25 RpcReply "rpc_reply" either ["request_id" "from_node"]
    0x30 SwimPing "swim_ping" atoms []
    0x31 SwimAck "swim_ack" atoms []
    0x32 SwimPingReq "swim_ping_req" atoms []
    0x40 FindNode "find_node" atoms []
    0x41 FindNodeReply "find_node_reply" atoms []
    0x42 Store "store" atoms []
    0x43 FindValue "find_value" atoms []
    0x44 FindValueReply "find_value_reply" atoms []
    0x50 NatProbe "nat_probe" either ["node_id" "local_port"]
    0x51 NatProbeReply "nat_probe_reply" either ["node_id" "reflexive_ip" "reflexive_port" "server_time"]
    0x52 PunchRequest "punch_request" either ["session_id" "requester_id" "target_id"]
    0x53 PunchCoordinate "punch_coordinate" either ["session_id" "peer_id" "peer_host" "peer_ports" "punch_time" "role"]
    0x54 PunchExecute "punch_execute" atoms []
    0x55 PunchResult "punch_result" either ["session_id" "success"]
    0x56 RelayRequest "relay_request" either ["session_id" "target_id"]
    0x57 RelayData "relay_data" either ["session_id" "payload"]
    0x60 BridgeRpc "bridge_rpc" atoms []
    0x61 BridgeData "bridge_data" atoms []
}

impl MessageType {
    /// The type's id on the wire.
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// Whether a 0.14.3 gateway answers this type on the stream it came on, so that a sender that stops reading at once
    /// never sees the answer.
    pub const fn is_answered(self) -> bool {
        matches!(
            self,
            Self::Ping
                | Self::NatProbe
                | Self::RpcRequest
                | Self::FindValue
                | Self::FindNode
                | Self::Store
                | Self::Call
        )
    }
}

/// The fields that a message must have to be sent; see [`MessageType::required`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Required {
    /// The names of the fields. Empty: anything goes.
    pub fields: &'static [&'static str],
    /// Whether the keys may all be binaries instead of all being atoms. The spelling of the *first* field decides which
    /// of the two is required.
    pub binary_keys: bool,
}
